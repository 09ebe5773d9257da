"""transformers' Llama, Qwen2 and Qwen3 decoders as one ``lax.scan`` over layers, and their rows."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from e5v_jax.nn.attention import attention
from e5v_jax.nn.layers import Build, Linear, RMSNorm
from e5v_jax.nn.parameters import Parameter, Section, linear
from e5v_jax.nn.remat import INPUT, MLP, O_PROJ, QKV_PROJ, Remat, rematerialise
from e5v_jax.nn.rope import apply_rope, mrope_axes, rope_angles, rope_frequencies
from e5v_jax.nn.text_config import TextConfig

_COLUMNS, _ROWS = P("fsdp", "tensor"), P("tensor", "fsdp")
"""Which mesh axes split a kernel [in, out]."""


def take(x: jax.Array, index: jax.Array) -> jax.Array:
    """Position ``index`` [B] of each row: [B, T, D] -> [B, D]."""
    return jnp.take_along_axis(x, index[:, None, None], axis=1)[:, 0]


class Deepstack(NamedTuple):
    """Features of images that are added after the first layers (arXiv 2406.04334)."""

    features: jax.Array  # [B, J, N, D]: for layer 0 to J - 1, of N image tokens
    image_index: jax.Array  # int32 [B, L], which of the N stands at a position; below 0 none


class Packing(NamedTuple):
    """Several continuations of one beginning in a row, none of which sees another."""

    segment: (
        jax.Array | np.ndarray
    )  # int32 [B, L], which continuation a token belongs to; 0 is the beginning
    shift: (
        jax.Array | np.ndarray
    )  # int32 [B, L], how much earlier than its place a token would stand alone


class Attention(nnx.Module):
    """Causal self-attention with grouped key/value heads and rotary positions."""

    def __init__(self, cfg: TextConfig, build: Build, *, rngs: nnx.Rngs) -> None:
        d, h = cfg.hidden_size, cfg.head_dim
        n, k = cfg.num_attention_heads, cfg.num_key_value_heads
        qkv = partial(
            Linear, build=build, rngs=rngs, use_bias=cfg.qkv_bias, result=QKV_PROJ, spec=_COLUMNS
        )
        self.q_proj, self.k_proj, self.v_proj = qkv(d, n * h), qkv(d, k * h), qkv(d, k * h)
        self.o_proj = Linear(n * h, d, build, rngs=rngs, result=O_PROJ, spec=_ROWS)
        if cfg.qk_norm:
            self.q_norm = RMSNorm(h, eps=cfg.rms_norm_eps, precision=build.precision)
            self.k_norm = RMSNorm(h, eps=cfg.rms_norm_eps, precision=build.precision)
        self.head_dim, self.qk_norm = h, cfg.qk_norm
        scaling = cfg.rope_scaling
        self.rope_scale = (scaling and scaling.attention_factor) or 1.0
        self.precision, self.runtime = build.precision, build.runtime

    def __call__(
        self,
        x: jax.Array,
        angles: jax.Array,
        keys: list[jax.Array | None],
        segment: jax.Array | None = None,
    ) -> jax.Array:
        """[B, T, D] -> [B, T, D]; ``keys`` are dropout keys for q, k, v, o."""
        b, t, _ = x.shape
        q = self.q_proj(x, dropout_key=keys[0]).reshape(b, t, -1, self.head_dim)  # [B, T, N, H]
        k = self.k_proj(x, dropout_key=keys[1]).reshape(b, t, -1, self.head_dim)  # [B, T, K, H]
        v = self.v_proj(x, dropout_key=keys[2]).reshape(b, t, -1, self.head_dim)  # [B, T, K, H]
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = apply_rope(q, angles, self.rope_scale), apply_rope(k, angles, self.rope_scale)
        precision, runtime = self.precision, self.runtime
        out = attention(
            q, k, v, is_causal=True, segment=segment, precision=precision, runtime=runtime
        )  # [B, T, N, H]
        return self.o_proj(out.reshape(b, t, -1), dropout_key=keys[3])

    def at(self, x: jax.Array, angles: jax.Array, index: jax.Array) -> jax.Array:
        """What ``self(x)`` has at position ``index`` [B] of each row: [B, T, D] -> [B, D].

        No activation is rounded to int8, as all of them are in ``self(x)`` where the model says so.
        """
        b, t, _ = x.shape
        q = self.q_proj(take(x, index), exact=True).reshape(1, b, -1, self.head_dim)  # [1, B, N, H]
        k = self.k_proj(x, exact=True).reshape(b, t, -1, self.head_dim)  # [B, T, K, H]
        v = self.v_proj(x, exact=True).reshape(b, t, -1, self.head_dim)  # [B, T, K, H]
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        own = angles[index] if angles.ndim == 2 else take(angles, index)  # [B, H/2]
        q = apply_rope(q, own, self.rope_scale).swapaxes(0, 1)  # [B, 1, N, H]
        k = apply_rope(k, angles, self.rope_scale)
        precision, runtime = self.precision, self.runtime
        out = attention(
            q, k, v, is_causal=False, key_lengths=index + 1, precision=precision, runtime=runtime
        )  # [B, 1, N, H]
        return self.o_proj(out.reshape(b, -1), exact=True)


class SwiGLU(nnx.Module):
    """``down(silu(gate(x)) * up(x))``."""

    def __init__(self, cfg: TextConfig, build: Build, *, rngs: nnx.Rngs) -> None:
        d, f = cfg.hidden_size, cfg.intermediate_size
        self.gate_proj = Linear(d, f, build, rngs=rngs, result=MLP, spec=_COLUMNS)
        self.up_proj = Linear(d, f, build, rngs=rngs, result=MLP, spec=_COLUMNS)
        self.down_proj = Linear(f, d, build, rngs=rngs, result=MLP, spec=_ROWS)

    def __call__(
        self, x: jax.Array, keys: list[jax.Array | None], *, exact: bool = False
    ) -> jax.Array:
        """[B, T, D] -> [B, T, D]; ``keys`` are dropout keys for gate, up, down."""
        gate = self.gate_proj(x, dropout_key=keys[0], exact=exact)  # [B, T, F]
        up = self.up_proj(x, dropout_key=keys[1], exact=exact)  # [B, T, F]
        return self.down_proj(jax.nn.silu(gate) * up, dropout_key=keys[2], exact=exact)


class DecoderLayer(nnx.Module):
    """Pre-norm attention and MLP, each with a residual connection."""

    def __init__(self, cfg: TextConfig, build: Build, *, rngs: nnx.Rngs) -> None:
        eps = cfg.rms_norm_eps
        self.input_layernorm = RMSNorm(cfg.hidden_size, eps=eps, precision=build.precision)
        self.self_attn = Attention(cfg, build, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, eps=eps, precision=build.precision)
        self.mlp = SwiGLU(cfg, build, rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        angles: jax.Array,
        dropout_key: jax.Array | None,
        segment: jax.Array | None = None,
    ) -> jax.Array:
        """[B, T, D] -> [B, T, D]."""
        keys: list[jax.Array | None] = [None] * 7
        if dropout_key is not None:
            keys = list(jax.random.split(dropout_key, 7))
        x = x + self.self_attn(self.input_layernorm(x), angles, keys[:4], segment)
        return x + self.mlp(self.post_attention_layernorm(x), keys[4:])

    def at(self, x: jax.Array, angles: jax.Array, index: jax.Array) -> jax.Array:
        """What ``self(x)`` has at position ``index`` [B] of each row: [B, T, D] -> [B, D].

        Of the other positions only keys and values are computed.
        """
        pooled = take(x, index) + self.self_attn.at(self.input_layernorm(x), angles, index)
        return pooled + self.mlp(self.post_attention_layernorm(pooled), [None] * 3, exact=True)


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
        self,
        x: jax.Array,
        *,
        positions: jax.Array | None = None,
        deepstack: Deepstack | None = None,
        packing: Packing | None = None,
        remat: Remat = "none",
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """Run all layers over embeddings [B, T, D] -> hidden states [B, T, D] **before** the norm.

        The caller gathers the pooled token first and norms only that one. ``positions`` are int32
        [B, T, 3], time, row and column of each token, where a model has them (M-RoPE); without
        them token t is at t. With ``packing`` each continuation is as if it stood alone. Raises
        ValueError: ``deepstack`` is for more layers than there are.
        """
        segment = None
        if packing is not None:
            segment = jnp.asarray(packing.segment)
            places = jnp.arange(x.shape[1])[:, None] if positions is None else positions
            positions = jnp.broadcast_to(places - packing.shift[..., None], (*x.shape[:2], 3))
        angles = self.angles(x.shape[1], positions)
        add = self._deepstack_addition(deepstack)
        keys = None
        if dropout_key is not None:
            keys = jax.random.split(dropout_key, self.cfg.num_hidden_layers)

        def body(
            h: jax.Array, xs: tuple[DecoderLayer, jax.Array | None, jax.Array | None]
        ) -> tuple[jax.Array, None]:
            layer, key, number = xs
            split = self.runtime.split_batch
            h = checkpoint_name(split(h), INPUT)
            return split(add(layer(h, angles, key, segment), number)), None

        numbers = None if deepstack is None else jnp.arange(self.cfg.num_hidden_layers)
        x, _ = jax.lax.scan(rematerialise(body, remat), x, (self.layers, keys, numbers))
        return x

    def at(
        self,
        x: jax.Array,
        index: jax.Array,
        *,
        positions: jax.Array | None = None,
        deepstack: Deepstack | None = None,
    ) -> jax.Array:
        """What ``self(x)`` has at position ``index`` [B] of each row: [B, T, D] -> [B, D].

        The last layer is computed for that position only. For inference: nothing is kept for a
        backward pass.
        """
        angles = self.angles(x.shape[1], positions)
        add = self._deepstack_addition(deepstack)
        last = self.cfg.num_hidden_layers - 1

        def layer(i: jax.Array | int) -> DecoderLayer:
            # indexed, not sliced: a slice of all layers but the last would be a copy of them
            taken: DecoderLayer = jax.tree.map(
                lambda stack: jax.lax.dynamic_index_in_dim(stack, i, keepdims=False), self.layers
            )
            return taken

        def body(i: jax.Array, h: jax.Array) -> jax.Array:
            split = self.runtime.split_batch
            return split(add(layer(i)(split(h), angles, None), i))

        x = jax.lax.fori_loop(0, last, body, x)
        pooled = layer(last).at(x, angles, index)  # [B, D]
        if deepstack is None:
            return pooled
        own = jnp.take_along_axis(deepstack.image_index, index[:, None], axis=1)  # [B, 1]
        add = self._deepstack_addition(deepstack._replace(image_index=own))
        return add(pooled[:, None], last)[:, 0]

    def angles(self, length: int, positions: jax.Array | None) -> jax.Array:
        """Rotary angles, fp32, [T, H/2] without ``positions`` [B, T, 3], [B, T, H/2] with them."""
        cfg = self.cfg
        frequency = rope_frequencies(
            head_dim=cfg.head_dim, theta=cfg.rope_theta, scaling=cfg.rope_scaling
        )
        if positions is None:
            return rope_angles(jnp.arange(length), frequency)
        section = cfg.mrope_section or (len(frequency), 0, 0)
        axes = mrope_axes(section, interleaved=cfg.mrope_interleaved)
        return rope_angles(jnp.asarray(positions), frequency, axes)

    def _deepstack_addition(
        self, deepstack: Deepstack | None
    ) -> Callable[[jax.Array, Any], jax.Array]:
        """What is done to hidden states [B, T, D] after the layer of a number."""
        if deepstack is None:
            return lambda h, number: h
        features, image_index = deepstack
        count, layers = features.shape[1], self.cfg.num_hidden_layers
        if count > layers:
            raise ValueError(f"deepstack features for {count} layers: the decoder has {layers}")
        place = jnp.maximum(image_index, 0)[..., None]  # [B, T, 1]

        def add(h: jax.Array, number: jax.Array) -> jax.Array:
            own = jax.lax.dynamic_index_in_dim(features, number, axis=1, keepdims=False)
            own = jnp.take_along_axis(own, place, axis=1).astype(h.dtype)  # [B, T, D]
            return h + jnp.where(image_index[..., None] >= 0, own, 0)

        return lambda h, number: jax.lax.cond(number < count, add, lambda h, _: h, h, number)


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
    maps = {
        "self_attn.q_proj": ((d, q), _COLUMNS),
        "self_attn.k_proj": ((d, kv), _COLUMNS),
        "self_attn.v_proj": ((d, kv), _COLUMNS),
        "self_attn.o_proj": ((q, d), _ROWS),
        "mlp.gate_proj": ((d, f), _COLUMNS),
        "mlp.up_proj": ((d, f), _COLUMNS),
        "mlp.down_proj": ((f, d), _ROWS),
    }
    hf, ours = "layers.{i}.", "language_model.layers.{i}."
    found = [
        Parameter("text", "embed_tokens.weight", "language_model.embed_tokens", table, _ROWS),
        Parameter("text", "norm.weight", "language_model.norm.scale", (d,), P(None)),
        Parameter("head", "lm_head.weight", "", table, P()),
    ]
    for name in ("input_layernorm", "post_attention_layernorm"):
        scale = f"{ours}{name}.scale"
        found.append(Parameter("text", f"{hf}{name}.weight", scale, (d,), P(None), layers=layers))
    for name in ("self_attn.q_norm", "self_attn.k_norm") if cfg.qk_norm else ():
        scale, size = f"{ours}{name}.scale", (cfg.head_dim,)
        found.append(Parameter("text", f"{hf}{name}.weight", scale, size, P(None), layers=layers))
    biased = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj") if cfg.qkv_bias else ()
    for name, (sizes, spec) in maps.items():
        like = Parameter("text", hf + name, ours + name, sizes, spec, layers=layers, lora=True)
        found += linear(like, bias=P("tensor") if name in biased else None)
    return found
