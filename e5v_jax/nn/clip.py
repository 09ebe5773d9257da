"""CLIP's vision tower up to the block whose output feeds the projector, and its rows.

Reference: transformers' ``CLIPVisionModel``.
"""

from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from e5v_jax.nn.attention import attention
from e5v_jax.nn.config import VisionConfig
from e5v_jax.nn.layers import Build, LayerNorm, Linear
from e5v_jax.nn.parameters import Parameter, layer_norm, linear

# What CLIP was trained with: pixels = (tile / 255 - IMAGE_MEAN) / IMAGE_STD, in float32.
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)


def quick_gelu(x: jax.Array) -> jax.Array:
    """``x * sigmoid(1.702 x)``, the activation of OpenAI's CLIP."""
    return x * jax.nn.sigmoid(1.702 * x)


def exact_gelu(x: jax.Array) -> jax.Array:
    """GELU with the error function, as ``torch.nn.GELU()``."""
    return jax.nn.gelu(x, approximate=False)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "quick_gelu": quick_gelu,
    "gelu": exact_gelu,
}


class ClipAttention(nnx.Module):
    """Bidirectional self-attention with biases."""

    def __init__(self, cfg: VisionConfig, build: Build, *, rngs: nnx.Rngs) -> None:
        d = cfg.hidden_size
        self.q_proj = Linear(d, d, build, use_bias=True, rngs=rngs)
        self.k_proj = Linear(d, d, build, use_bias=True, rngs=rngs)
        self.v_proj = Linear(d, d, build, use_bias=True, rngs=rngs)
        self.out_proj = Linear(d, d, build, use_bias=True, rngs=rngs)
        self.num_heads = cfg.num_attention_heads
        self.precision, self.runtime = build.precision, build.runtime

    def __call__(self, x: jax.Array) -> jax.Array:
        """[T, P, D] -> [T, P, D]."""
        b, p, d = x.shape
        heads = (b, p, self.num_heads, d // self.num_heads)
        q = self.q_proj(x).reshape(heads)  # [T, P, N, H]
        k = self.k_proj(x).reshape(heads)
        v = self.v_proj(x).reshape(heads)
        out = attention(q, k, v, is_causal=False, precision=self.precision, runtime=self.runtime)
        return self.out_proj(out.reshape(b, p, d))


class ClipMLP(nnx.Module):
    """Two linear maps around the activation."""

    def __init__(self, cfg: VisionConfig, build: Build, *, rngs: nnx.Rngs) -> None:
        d, f = cfg.hidden_size, cfg.intermediate_size
        self.fc1 = Linear(d, f, build, use_bias=True, rngs=rngs)
        self.fc2 = Linear(f, d, build, use_bias=True, rngs=rngs)
        self.hidden_act = cfg.hidden_act

    def __call__(self, x: jax.Array) -> jax.Array:
        """[T, P, D] -> [T, P, D]."""
        return self.fc2(ACTIVATIONS[self.hidden_act](self.fc1(x)))


class ClipLayer(nnx.Module):
    """Pre-norm transformer block."""

    def __init__(self, cfg: VisionConfig, build: Build, *, rngs: nnx.Rngs) -> None:
        eps = cfg.layer_norm_eps
        self.layer_norm1 = LayerNorm(cfg.hidden_size, eps=eps, precision=build.precision)
        self.self_attn = ClipAttention(cfg, build, rngs=rngs)
        self.layer_norm2 = LayerNorm(cfg.hidden_size, eps=eps, precision=build.precision)
        self.mlp = ClipMLP(cfg, build, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[T, P, D] -> [T, P, D]."""
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class ClipVision(nnx.Module):
    """Tiles to patch features: ``num_layers`` blocks, class token dropped, no post-norm."""

    def __init__(self, cfg: VisionConfig, num_layers: int, build: Build, *, rngs: nnx.Rngs) -> None:
        init, dtype = jax.nn.initializers.normal(0.02), jnp.dtype(build.precision.param)
        d = cfg.hidden_size
        self.class_embedding = nnx.Param(init(rngs.params(), (d,), dtype))
        self.patch_embedding = Linear(3 * cfg.patch_size**2, d, build, rngs=rngs)
        self.position_embedding = nnx.Param(init(rngs.params(), (cfg.num_patches + 1, d), dtype))
        self.pre_layrnorm = LayerNorm(d, eps=cfg.layer_norm_eps, precision=build.precision)
        self.layers = jax.vmap(lambda key: ClipLayer(cfg, build, rngs=nnx.Rngs(params=key)))(
            jax.random.split(rngs.params(), num_layers)
        )
        self.cfg = cfg
        self.precision = build.precision

    def __call__(self, tiles: jax.Array | np.ndarray) -> jax.Array:
        """uint8 tiles [T, S, S, 3] -> features [T, P, D], patches row by row, compute dtype."""
        t, p = tiles.shape[0], self.cfg.patch_size
        side = self.cfg.image_size // p
        pixels = jnp.asarray(tiles, jnp.float32) / 255.0
        pixels = (pixels - jnp.asarray(IMAGE_MEAN)) / jnp.asarray(IMAGE_STD)  # fp32, as the host's
        pixels = pixels.reshape(t, side, p, side, p, 3)
        pixels = pixels.transpose(0, 1, 3, 5, 2, 4)  # [T, rows, columns, 3, p, p]
        x = self.patch_embedding(pixels.reshape(t, side * side, 3 * p * p))  # [T, P, D]
        dtype = self.precision.compute
        cls = jnp.broadcast_to(self.class_embedding[...].astype(dtype), (t, 1, x.shape[-1]))
        x = jnp.concatenate([cls, x], axis=1)  # [T, 1 + P, D]
        x = self.pre_layrnorm(x + self.position_embedding[...].astype(dtype))

        def body(h: jax.Array, layer: ClipLayer) -> tuple[jax.Array, None]:
            return layer(h), None

        x, _ = jax.lax.scan(body, x, self.layers)
        return x[:, 1:]  # the class token is dropped


def clip_parameters(cfg: VisionConfig, num_layers: int) -> list[Parameter]:
    """The rows of a :class:`ClipVision` at ``vision_tower`` that keeps ``num_layers`` blocks."""
    d, f = cfg.hidden_size, cfg.intermediate_size
    columns, rows = P("fsdp", "tensor"), P("tensor", "fsdp")

    def one(hf: str, name: str, shape: tuple[int, ...], spec: P) -> Parameter:
        return Parameter("vision", hf, name and f"vision_tower.{name}", shape, spec)

    def block(name: str, shape: tuple[int, ...], spec: P) -> Parameter:
        row = one(f"encoder.layers.{{i}}.{name}", f"layers.{{i}}.{name}", shape, spec)
        unused = cfg.num_hidden_layers - num_layers
        return replace(row, layers=num_layers, unused_layers=unused)

    patch = one(
        "embeddings.patch_embedding.weight",
        "patch_embedding.kernel",
        (3 * cfg.patch_size**2, d),
        P(None, "fsdp"),
    )
    position = (cfg.num_patches + 1, d)
    found = [
        one("embeddings.class_embedding", "class_embedding", (d,), P(None)),
        replace(patch, transform="conv"),
        one("embeddings.position_embedding.weight", "position_embedding", position, P(None, None)),
        *layer_norm(one("pre_layrnorm", "pre_layrnorm", (d,), P(None))),
        *layer_norm(one("post_layernorm", "", (d,), P(None))),  # features are taken before it
    ]
    for name in ("layer_norm1", "layer_norm2"):
        found += layer_norm(block(name, (d,), P(None)))
    for name in ("q_proj", "k_proj", "v_proj"):
        found += linear(block(f"self_attn.{name}", (d, d), columns), bias=P("tensor"))
    found += linear(block("self_attn.out_proj", (d, d), rows), bias=P(None))
    found += linear(block("mlp.fc1", (d, f), columns), bias=P("tensor"))
    found += linear(block("mlp.fc2", (f, d), rows), bias=P(None))
    return found
