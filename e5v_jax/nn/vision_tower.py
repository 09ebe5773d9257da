"""Vision towers up to the blocks whose outputs feed the projector, and their rows.

Reference: transformers' ``CLIPVisionModel``, ``SiglipVisionModel`` and ``Dinov2Model``: the same
blocks, which differ in a class token, a norm before them, biases, and scales behind their halves.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from e5v_jax.nn.attention import attention
from e5v_jax.nn.layers import Build, LayerNorm, Linear
from e5v_jax.nn.parameters import Parameter, layer_norm, linear
from e5v_jax.nn.vision_config import CLIP, DINOV2, SIGLIP, VisionConfig


def quick_gelu(x: jax.Array) -> jax.Array:
    """``x * sigmoid(1.702 x)``, the activation of OpenAI's CLIP."""
    return x * jax.nn.sigmoid(1.702 * x)


def exact_gelu(x: jax.Array) -> jax.Array:
    """GELU with the error function, as ``torch.nn.GELU()``."""
    return jax.nn.gelu(x, approximate=False)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "quick_gelu": quick_gelu,
    "gelu": exact_gelu,
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
}


class TowerAttention(nnx.Module):
    """Bidirectional self-attention; the biases of its inputs are optional."""

    def __init__(self, cfg: VisionConfig, build: Build, *, rngs: nnx.Rngs) -> None:
        d = cfg.hidden_size
        self.q_proj = Linear(d, d, build, use_bias=cfg.qkv_bias, rngs=rngs)
        self.k_proj = Linear(d, d, build, use_bias=cfg.qkv_bias, rngs=rngs)
        self.v_proj = Linear(d, d, build, use_bias=cfg.qkv_bias, rngs=rngs)
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


class TowerMLP(nnx.Module):
    """Two linear maps around the activation; with SwiGLU the first is gate and value in one."""

    def __init__(self, cfg: VisionConfig, build: Build, *, rngs: nnx.Rngs) -> None:
        d, f = cfg.hidden_size, cfg.intermediate_size
        self.fc1 = Linear(d, 2 * f if cfg.use_swiglu_ffn else f, build, use_bias=True, rngs=rngs)
        self.fc2 = Linear(f, d, build, use_bias=True, rngs=rngs)
        self.hidden_act, self.use_swiglu_ffn = cfg.hidden_act, cfg.use_swiglu_ffn

    def __call__(self, x: jax.Array) -> jax.Array:
        """[T, P, D] -> [T, P, D]."""
        if self.use_swiglu_ffn:
            gate, value = jnp.split(self.fc1(x), 2, axis=-1)  # [T, P, F]
            return self.fc2(jax.nn.silu(gate) * value)
        return self.fc2(ACTIVATIONS[self.hidden_act](self.fc1(x)))


class TowerLayer(nnx.Module):
    """Pre-norm transformer block; DINOv2's scales what either half adds."""

    def __init__(self, cfg: VisionConfig, build: Build, *, rngs: nnx.Rngs) -> None:
        eps = cfg.layer_norm_eps
        self.layer_norm1 = LayerNorm(cfg.hidden_size, eps=eps, precision=build.precision)
        self.self_attn = TowerAttention(cfg, build, rngs=rngs)
        self.layer_norm2 = LayerNorm(cfg.hidden_size, eps=eps, precision=build.precision)
        self.mlp = TowerMLP(cfg, build, rngs=rngs)
        self.is_scaled = cfg.model_type == DINOV2
        if self.is_scaled:
            ones = jnp.ones((cfg.hidden_size,), build.precision.param)
            self.layer_scale1, self.layer_scale2 = nnx.Param(ones), nnx.Param(ones)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[T, P, D] -> [T, P, D]."""
        if not self.is_scaled:
            x = x + self.self_attn(self.layer_norm1(x))
            return x + self.mlp(self.layer_norm2(x))
        scale1, scale2 = (y[...].astype(x.dtype) for y in (self.layer_scale1, self.layer_scale2))
        x = x + scale1 * self.self_attn(self.layer_norm1(x))
        return x + scale2 * self.mlp(self.layer_norm2(x))


class VisionTower(nnx.Module):
    """Tiles to patch features: what comes out of the blocks numbered ``depths``, from 1.

    The class token is dropped, the norm behind the last block left out; blocks behind the deepest
    of ``depths`` do not exist.
    """

    def __init__(
        self, cfg: VisionConfig, depths: Sequence[int], build: Build, *, rngs: nnx.Rngs
    ) -> None:
        init, dtype = jax.nn.initializers.normal(0.02), jnp.dtype(build.precision.param)
        d = cfg.hidden_size
        if cfg.has_class_token:
            self.class_embedding = nnx.Param(init(rngs.params(), (d,), dtype))
        bias = cfg.model_type != CLIP
        plain = Build(build.precision.unquantized, build.runtime)
        self.patch_embedding = Linear(3 * cfg.patch_size**2, d, plain, use_bias=bias, rngs=rngs)
        self.position_embedding = nnx.Param(init(rngs.params(), (cfg.num_positions, d), dtype))
        if cfg.model_type == CLIP:
            self.pre_layrnorm = LayerNorm(d, eps=cfg.layer_norm_eps, precision=build.precision)
        self.layers = jax.vmap(lambda key: TowerLayer(cfg, build, rngs=nnx.Rngs(params=key)))(
            jax.random.split(rngs.params(), max(depths))
        )
        self.cfg, self.depths = cfg, tuple(depths)
        self.precision = build.precision

    def __call__(self, tiles: jax.Array | np.ndarray) -> jax.Array:
        """uint8 tiles [T, S, S, 3] -> features [T, P, len(depths) * D] in the compute dtype.

        Patches come row by row, the features of the depths one behind the other.
        """
        x = self.embed(tiles)  # [T, 1 + P, D], or [T, P, D] without a class token

        def body(h: jax.Array, layer: TowerLayer) -> tuple[jax.Array, None]:
            return layer(h), None

        outputs: dict[int, jax.Array] = {}
        start = 0
        for end in sorted(set(self.depths)):
            layers = self.layers
            if len(set(self.depths)) > 1:
                layers = jax.tree.map(lambda a, part=slice(start, end): a[part], layers)
            x, _ = jax.lax.scan(body, x, layers)
            outputs[end] = x
            start = end
        first = 1 if self.cfg.has_class_token else 0  # the class token is dropped
        features = [outputs[depth][:, first:] for depth in self.depths]
        return features[0] if len(features) == 1 else jnp.concatenate(features, axis=-1)

    def embed(self, tiles: jax.Array | np.ndarray) -> jax.Array:
        """uint8 tiles [T, S, S, 3] -> what the first block gets, [T, positions, D]."""
        t, p, side = tiles.shape[0], self.cfg.patch_size, self.cfg.patches_per_side
        pixels = normalise(tiles, self.cfg.image_mean, self.cfg.image_std)
        if side * p < self.cfg.image_size:  # as a convolution, which has no patch for the rest
            pixels = pixels[:, : side * p, : side * p]
        pixels = pixels.reshape(t, side, p, side, p, 3)
        pixels = pixels.transpose(0, 1, 3, 5, 2, 4)  # [T, rows, columns, 3, p, p]
        x = self.patch_embedding(pixels.reshape(t, side * side, 3 * p * p))  # [T, P, D]
        dtype = self.precision.compute
        if self.cfg.has_class_token:
            cls = jnp.broadcast_to(self.class_embedding[...].astype(dtype), (t, 1, x.shape[-1]))
            x = jnp.concatenate([cls, x], axis=1)  # [T, 1 + P, D]
        x = x + self.position_embedding[...].astype(dtype)
        return self.pre_layrnorm(x) if self.cfg.model_type == CLIP else x


def normalise(
    tiles: jax.Array | np.ndarray, mean: Sequence[float], std: Sequence[float]
) -> jax.Array:
    """Pixels from 0 to 255, [..., 3], as fp32 of the given mean and deviation, as the host's."""
    pixels = jnp.asarray(tiles, jnp.float32) / 255.0
    return (pixels - jnp.asarray(mean)) / jnp.asarray(std)


_DINOV2_NAMES = {
    "encoder.layers.": "encoder.layer.",
    "embeddings.class_embedding": "embeddings.cls_token",
    "embeddings.patch_embedding": "embeddings.patch_embeddings.projection",
    "embeddings.position_embedding.weight": "embeddings.position_embeddings",
    "post_layernorm": "layernorm",
    ".layer_norm": ".norm",
    "self_attn.q_proj": "attention.attention.query",
    "self_attn.k_proj": "attention.attention.key",
    "self_attn.v_proj": "attention.attention.value",
    "self_attn.out_proj": "attention.output.dense",
}
"""Parts of CLIP's names, and what stands there in DINOv2's files, of any transformers."""
_SWIGLU_NAMES = {"mlp.fc1": "mlp.weights_in", "mlp.fc2": "mlp.weights_out"}


def tower_parameters(cfg: VisionConfig, num_layers: int) -> list[Parameter]:
    """The rows of a :class:`VisionTower` at ``vision_tower`` that keeps ``num_layers`` blocks."""
    d, f = cfg.hidden_size, cfg.intermediate_size
    columns, rows = P("fsdp", "tensor"), P("tensor", "fsdp")
    is_dinov2 = cfg.model_type == DINOV2
    theirs = {**_DINOV2_NAMES, **(_SWIGLU_NAMES if cfg.use_swiglu_ffn else {})} if is_dinov2 else {}

    def one(hf: str, name: str, shape: tuple[int, ...], spec: P) -> Parameter:
        for part, other in theirs.items():
            hf = hf.replace(part, other)
        return Parameter("vision", hf, name and f"vision_tower.{name}", shape, spec)

    def block(name: str, shape: tuple[int, ...], spec: P) -> Parameter:
        row = one(f"encoder.layers.{{i}}.{name}", f"layers.{{i}}.{name}", shape, spec)
        unused = cfg.num_hidden_layers - num_layers
        return replace(row, layers=num_layers, unused_layers=unused)

    shape = (3 * cfg.patch_size**2, d)
    patch = one("embeddings.patch_embedding", "patch_embedding", shape, P(None, "fsdp"))
    kernel, *biases = linear(patch, bias=None if cfg.model_type == CLIP else P(None))
    position_name = "embeddings.position_embedding.weight"
    position = one(position_name, "position_embedding", (cfg.num_positions, d), P(None, None))
    found = [replace(kernel, transform="conv"), *biases]
    tokens = [position]
    if cfg.has_class_token:
        tokens.append(one("embeddings.class_embedding", "class_embedding", (d,), P(None)))
    found += [replace(row, transform="batch") for row in tokens] if is_dinov2 else tokens
    found += layer_norm(one("post_layernorm", "", (d,), P(None)))  # features are taken before it
    if cfg.model_type == CLIP:
        found += layer_norm(one("pre_layrnorm", "pre_layrnorm", (d,), P(None)))
    if cfg.model_type == SIGLIP:
        found += _siglip_head(d, f)
    if is_dinov2:
        mask = one("embeddings.mask_token", "", (1, d), P(None, None))
        found.append(replace(mask, optional=True))  # pretraining puts it in a hidden patch's place
        for name in ("layer_scale1", "layer_scale2"):
            scale = block(name, (d,), P(None))
            found.append(replace(scale, hf=f"{scale.hf}.lambda1"))
    for name in ("layer_norm1", "layer_norm2"):
        found += layer_norm(block(name, (d,), P(None)))
    for name in ("q_proj", "k_proj", "v_proj"):
        bias = P("tensor") if cfg.qkv_bias else None
        found += linear(block(f"self_attn.{name}", (d, d), columns), bias=bias)
    found += linear(block("self_attn.out_proj", (d, d), rows), bias=P(None))
    width = 2 * f if cfg.use_swiglu_ffn else f
    found += linear(block("mlp.fc1", (d, width), columns), bias=P("tensor"))
    found += linear(block("mlp.fc2", (f, d), rows), bias=P(None))
    return found


def _siglip_head(d: int, f: int) -> list[Parameter]:
    """The rows of SigLIP's pooling head, which embeds a whole image and is kept for an export."""
    shapes: dict[str, tuple[int, ...]] = {"probe": (1, 1, d)}
    shapes |= {"attention.in_proj_weight": (3 * d, d), "attention.in_proj_bias": (3 * d,)}
    for name, size in {"attention.out_proj": (d, d), "mlp.fc1": (f, d), "mlp.fc2": (d, f)}.items():
        shapes |= {f"{name}.weight": size, f"{name}.bias": size[:1]}
    shapes |= {"layernorm.weight": (d,), "layernorm.bias": (d,)}
    return [
        Parameter("vision", f"head.{name}", "", shape, P(*(None,) * len(shape)), optional=True)
        for name, shape in shapes.items()
    ]
