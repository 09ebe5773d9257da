"""transformers' ``LlamaModel`` as one ``lax.scan`` over stacked layers, and its rows."""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from e5v_jax.nn.attention import attention
from e5v_jax.nn.config import TextConfig
from e5v_jax.nn.layers import Build, Linear, RMSNorm, apply_rope, rope_angles
from e5v_jax.nn.parameters import Parameter, Section, linear

Remat = Literal["none", "dots", "full"]
"""What a backward pass keeps of each layer: everything, matmul outputs, or only its input."""


def take(x: jax.Array, index: jax.Array) -> jax.Array:
    """Position ``index`` [B] of each row: [B, T, D] -> [B, D]."""
    return jnp.take_along_axis(x, index[:, None, None], axis=1)[:, 0]


class Attention(nnx.Module):
    """Causal self-attention with grouped key/value heads and rotary positions."""

    def __init__(self, cfg: TextConfig, build: Build, *, rngs: nnx.Rngs) -> None:
        d, h = cfg.hidden_size, cfg.head_dim
        n, k = cfg.num_attention_heads, cfg.num_key_value_heads
        self.q_proj = Linear(d, n * h, build, rngs=rngs)
        self.k_proj = Linear(d, k * h, build, rngs=rngs)
        self.v_proj = Linear(d, k * h, build, rngs=rngs)
        self.o_proj = Linear(n * h, d, build, rngs=rngs)
        self.head_dim = h
        self.precision, self.runtime = build.precision, build.runtime

    def __call__(self, x: jax.Array, angles: jax.Array, keys: list[jax.Array | None]) -> jax.Array:
        """[B, T, D] -> [B, T, D]; ``keys`` are dropout keys for q, k, v, o."""
        b, t, _ = x.shape
        q = self.q_proj(x, dropout_key=keys[0]).reshape(b, t, -1, self.head_dim)  # [B, T, N, H]
        k = self.k_proj(x, dropout_key=keys[1]).reshape(b, t, -1, self.head_dim)  # [B, T, K, H]
        v = self.v_proj(x, dropout_key=keys[2]).reshape(b, t, -1, self.head_dim)  # [B, T, K, H]
        q, k = apply_rope(q, angles), apply_rope(k, angles)
        out = attention(
            q, k, v, is_causal=True, precision=self.precision, runtime=self.runtime
        )  # [B, T, N, H]
        return self.o_proj(out.reshape(b, t, -1), dropout_key=keys[3])

    def at(self, x: jax.Array, angles: jax.Array, index: jax.Array) -> jax.Array:
        """What ``self(x)`` has at position ``index`` [B] of each row: [B, T, D] -> [B, D]."""
        b, t, _ = x.shape
        q = self.q_proj(take(x, index)).reshape(1, b, -1, self.head_dim)  # [1, B, N, H]
        k = self.k_proj(x).reshape(b, t, -1, self.head_dim)  # [B, T, K, H]
        v = self.v_proj(x).reshape(b, t, -1, self.head_dim)  # [B, T, K, H]
        q = apply_rope(q, angles[index]).swapaxes(0, 1)  # [B, 1, N, H]
        k = apply_rope(k, angles)
        precision, runtime = self.precision, self.runtime
        out = attention(
            q, k, v, is_causal=False, key_lengths=index + 1, precision=precision, runtime=runtime
        )  # [B, 1, N, H]
        return self.o_proj(out.reshape(b, -1))


class SwiGLU(nnx.Module):
    """``down(silu(gate(x)) * up(x))``."""

    def __init__(self, cfg: TextConfig, build: Build, *, rngs: nnx.Rngs) -> None:
        d, f = cfg.hidden_size, cfg.intermediate_size
        self.gate_proj = Linear(d, f, build, rngs=rngs)
        self.up_proj = Linear(d, f, build, rngs=rngs)
        self.down_proj = Linear(f, d, build, rngs=rngs)

    def __call__(self, x: jax.Array, keys: list[jax.Array | None]) -> jax.Array:
        """[B, T, D] -> [B, T, D]; ``keys`` are dropout keys for gate, up, down."""
        gate = self.gate_proj(x, dropout_key=keys[0])  # [B, T, F]
        up = self.up_proj(x, dropout_key=keys[1])  # [B, T, F]
        return self.down_proj(jax.nn.silu(gate) * up, dropout_key=keys[2])


class DecoderLayer(nnx.Module):
    """Pre-norm attention and MLP, each with a residual connection."""

    def __init__(self, cfg: TextConfig, build: Build, *, rngs: nnx.Rngs) -> None:
        eps = cfg.rms_norm_eps
        self.input_layernorm = RMSNorm(cfg.hidden_size, eps=eps, precision=build.precision)
        self.self_attn = Attention(cfg, build, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, eps=eps, precision=build.precision)
        self.mlp = SwiGLU(cfg, build, rngs=rngs)

    def __call__(self, x: jax.Array, angles: jax.Array, dropout_key: jax.Array | None) -> jax.Array:
        """[B, T, D] -> [B, T, D]."""
        keys: list[jax.Array | None] = [None] * 7
        if dropout_key is not None:
            keys = list(jax.random.split(dropout_key, 7))
        x = x + self.self_attn(self.input_layernorm(x), angles, keys[:4])
        return x + self.mlp(self.post_attention_layernorm(x), keys[4:])

    def at(self, x: jax.Array, angles: jax.Array, index: jax.Array) -> jax.Array:
        """What ``self(x)`` has at position ``index`` [B] of each row: [B, T, D] -> [B, D].

        Of the other positions only keys and values are computed.
        """
        pooled = take(x, index) + self.self_attn.at(self.input_layernorm(x), angles, index)
        return pooled + self.mlp(self.post_attention_layernorm(pooled), [None] * 3)


class Decoder(nnx.Module):
    """Token embedding, decoder layers and final norm; there is no ``lm_head``."""

    def __init__(self, cfg: TextConfig, build: Build, *, rngs: nnx.Rngs) -> None:
        init = jax.nn.initializers.normal(0.02)
        table = (cfg.vocab_size, cfg.hidden_size)
        self.embed_tokens = nnx.Param(init(rngs.params(), table, jnp.dtype(build.precision.param)))
        self.layers = jax.vmap(lambda key: DecoderLayer(cfg, build, rngs=nnx.Rngs(params=key)))(
            jax.random.split(rngs.params(), cfg.num_hidden_layers)
        )
        self.norm = RMSNorm(cfg.hidden_size, eps=cfg.rms_norm_eps, precision=build.precision)
        self.cfg = cfg
        self.precision, self.runtime = build.precision, build.runtime

    def embed(self, input_ids: jax.Array | np.ndarray) -> jax.Array:
        """Token ids [B, T] -> embeddings [B, T, D] in the compute dtype."""
        return self.embed_tokens[...][input_ids].astype(self.precision.compute)

    def __call__(
        self, x: jax.Array, *, remat: Remat = "none", dropout_key: jax.Array | None = None
    ) -> jax.Array:
        """Run all layers over embeddings [B, T, D] -> hidden states [B, T, D] **before** the norm.

        The caller gathers the pooled token first and norms only that one.
        """
        angles = self._angles(x.shape[1])
        keys = None
        if dropout_key is not None:
            keys = jax.random.split(dropout_key, self.cfg.num_hidden_layers)

        def body(
            h: jax.Array, layer_and_key: tuple[DecoderLayer, jax.Array | None]
        ) -> tuple[jax.Array, None]:
            layer, key = layer_and_key
            split = self.runtime.split_batch
            return split(layer(split(h), angles, key)), None

        if remat == "full":
            body = jax.checkpoint(body, prevent_cse=False)
        elif remat == "dots":
            keep = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
            body = jax.checkpoint(body, prevent_cse=False, policy=keep)
        x, _ = jax.lax.scan(body, x, (self.layers, keys))
        return x

    def at(self, x: jax.Array, index: jax.Array) -> jax.Array:
        """What ``self(x)`` has at position ``index`` [B] of each row: [B, T, D] -> [B, D].

        The last layer is computed for that position only. For inference: nothing is kept for a
        backward pass.
        """
        angles = self._angles(x.shape[1])
        last = self.cfg.num_hidden_layers - 1

        def layer(i: jax.Array | int) -> DecoderLayer:
            # indexed, not sliced: a slice of all layers but the last would be a copy of them
            taken: DecoderLayer = jax.tree.map(
                lambda stack: jax.lax.dynamic_index_in_dim(stack, i, keepdims=False), self.layers
            )
            return taken

        def body(i: jax.Array, h: jax.Array) -> jax.Array:
            split = self.runtime.split_batch
            return split(layer(i)(split(h), angles, None))

        x = jax.lax.fori_loop(0, last, body, x)
        return layer(last).at(x, angles, index)

    def _angles(self, length: int) -> jax.Array:
        return rope_angles(
            jnp.arange(length), head_dim=self.cfg.head_dim, theta=self.cfg.rope_theta
        )  # [T, H/2]


TEXT_SECTIONS = {
    "text": Section(
        prefixes=("language_model.model.", "model.language_model.", "model.", ""),
        anchors=("embed_tokens.weight",),
        export="model.",
    ),
    "head": Section(
        prefixes=("language_model.", "model.language_model.", ""),
        anchors=("lm_head.weight",),
        export="",
    ),
}


def decoder_parameters(cfg: TextConfig) -> list[Parameter]:
    """The rows of a :class:`Decoder` at ``language_model``, and the head that embeddings skip."""
    d, f, layers = cfg.hidden_size, cfg.intermediate_size, cfg.num_hidden_layers
    q, kv = (n * cfg.head_dim for n in (cfg.num_attention_heads, cfg.num_key_value_heads))
    table = (cfg.vocab_size, d)
    columns, rows = P("fsdp", "tensor"), P("tensor", "fsdp")
    maps = {
        "self_attn.q_proj": ((d, q), columns),
        "self_attn.k_proj": ((d, kv), columns),
        "self_attn.v_proj": ((d, kv), columns),
        "self_attn.o_proj": ((q, d), rows),
        "mlp.gate_proj": ((d, f), columns),
        "mlp.up_proj": ((d, f), columns),
        "mlp.down_proj": ((f, d), rows),
    }
    hf, ours = "layers.{i}.", "language_model.layers.{i}."
    found = [
        Parameter("text", "embed_tokens.weight", "language_model.embed_tokens", table, rows),
        Parameter("text", "norm.weight", "language_model.norm.scale", (d,), P(None)),
        Parameter("head", "lm_head.weight", "", table, P()),
    ]
    for name in ("input_layernorm", "post_attention_layernorm"):
        scale = f"{ours}{name}.scale"
        found.append(Parameter("text", f"{hf}{name}.weight", scale, (d,), P(None), layers=layers))
    for name, (sizes, spec) in maps.items():
        like = Parameter("text", hf + name, ours + name, sizes, spec, layers=layers, lora=True)
        found += linear(like)
    return found
