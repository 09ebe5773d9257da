"""The blocks of the Qwen-VL towers: attention everywhere or in windows, two kinds of MLP, mergers.

Reference: the vision models of transformers' ``qwen2_vl``, ``qwen2_5_vl``, ``qwen2_5_omni`` and
``qwen3_vl``.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from e5v_jax.families.qwen_vl.vision_config import QwenVisionConfig
from e5v_jax.families.qwen_vl.windows import window_attention
from e5v_jax.nn.attention import attention
from e5v_jax.nn.layers import Build, LayerNorm, Linear, RMSNorm
from e5v_jax.nn.rope import apply_rope
from e5v_jax.nn.vision_tower import exact_gelu, quick_gelu

NORM_EPS = 1e-6  # of every norm; no field of the configuration


class Seen(NamedTuple):
    """Which patches each one attends to."""

    lengths: jax.Array  # int32 [B], patches that are no padding
    window: jax.Array | None  # int32 [B, P], the window of each; None: no block has any


def norm(cfg: QwenVisionConfig, features: int, build: Build) -> nnx.Module:
    """The norm of a tower's kind."""
    make = RMSNorm if cfg.kind.is_gated else LayerNorm
    return make(features, eps=NORM_EPS, precision=build.precision)


class VisionAttention(nnx.Module):
    """Self-attention of each image's patches, which are turned by row and column."""

    def __init__(self, cfg: QwenVisionConfig, build: Build, *, rngs: nnx.Rngs) -> None:
        d = cfg.hidden_size
        if cfg.kind.splits_qkv:
            self.q = Linear(d, d, build, use_bias=True, rngs=rngs)
            self.k = Linear(d, d, build, use_bias=True, rngs=rngs)
            self.v = Linear(d, d, build, use_bias=True, rngs=rngs)
        else:
            self.qkv = Linear(d, 3 * d, build, use_bias=True, rngs=rngs)
        self.proj = Linear(d, d, build, use_bias=True, rngs=rngs)
        self.num_heads, self.splits_qkv = cfg.num_heads, cfg.kind.splits_qkv
        self.window_size = cfg.window_side**2 * cfg.merged  # patches
        self.precision, self.runtime = build.precision, build.runtime

    def __call__(
        self, x: jax.Array, angles: jax.Array, seen: Seen, is_full: jax.Array | None = None
    ) -> jax.Array:
        """[B, P, D] -> [B, P, D]; ``angles`` are fp32 [B, P, H/2], ``is_full`` is a bool []
        that says whether the windows that there are count not."""
        b, p, d = x.shape
        if self.splits_qkv:
            q, k, v = (m(x).reshape(b, p, self.num_heads, -1) for m in (self.q, self.k, self.v))
        else:
            q, k, v = jnp.moveaxis(self.qkv(x).reshape(b, p, 3, self.num_heads, -1), 2, 0)
        # [B, P, N, H] each; turned in fp32, as the reference
        q, k = (apply_rope(t.astype(jnp.float32), angles).astype(v.dtype) for t in (q, k))

        def everywhere(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            return attention(
                q,
                k,
                v,
                is_causal=False,
                key_lengths=seen.lengths,
                precision=self.precision,
                runtime=self.runtime,
            )

        if (window := seen.window) is None:
            out = everywhere(q, k, v)
        else:

            def in_windows(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
                size, precision = self.window_size, self.precision
                return window_attention(q, k, v, window, size=size, precision=precision)

            out = jax.lax.cond(is_full, everywhere, in_windows, q, k, v)
        return self.proj(out.reshape(b, p, d))


class VisionMLP(nnx.Module):
    """Two linear maps around GELU: by tanh, or by a sigmoid."""

    def __init__(self, cfg: QwenVisionConfig, build: Build, *, rngs: nnx.Rngs) -> None:
        d, f = cfg.hidden_size, cfg.intermediate_size
        self.linear_fc1 = Linear(d, f, build, use_bias=True, rngs=rngs)
        self.linear_fc2 = Linear(f, d, build, use_bias=True, rngs=rngs)
        self.is_quick = cfg.hidden_act == "quick_gelu"

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, P, D] -> [B, P, D]."""
        x = self.linear_fc1(x)
        x = quick_gelu(x) if self.is_quick else jax.nn.gelu(x, approximate=True)
        return self.linear_fc2(x)


class VisionSwiGLU(nnx.Module):
    """``down(silu(gate(x)) * up(x))``, each with a bias."""

    def __init__(self, cfg: QwenVisionConfig, build: Build, *, rngs: nnx.Rngs) -> None:
        d, f = cfg.hidden_size, cfg.intermediate_size
        self.gate_proj = Linear(d, f, build, use_bias=True, rngs=rngs)
        self.up_proj = Linear(d, f, build, use_bias=True, rngs=rngs)
        self.down_proj = Linear(f, d, build, use_bias=True, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, P, D] -> [B, P, D]."""
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class VisionBlock(nnx.Module):
    """Pre-norm attention and MLP, each with a residual connection."""

    def __init__(self, cfg: QwenVisionConfig, build: Build, *, rngs: nnx.Rngs) -> None:
        self.norm1 = norm(cfg, cfg.hidden_size, build)
        self.norm2 = norm(cfg, cfg.hidden_size, build)
        self.attn = VisionAttention(cfg, build, rngs=rngs)
        self.mlp = (VisionSwiGLU if cfg.kind.is_gated else VisionMLP)(cfg, build, rngs=rngs)

    def __call__(
        self, x: jax.Array, angles: jax.Array, seen: Seen, is_full: jax.Array | None = None
    ) -> jax.Array:
        """[B, P, D] -> [B, P, D]; see :class:`VisionAttention`."""
        x = x + self.attn(self.norm1(x), angles, seen, is_full)
        return x + self.mlp(self.norm2(x))


class PatchMerger(nnx.Module):
    """A block of patches to one vector of the decoder."""

    def __init__(
        self, cfg: QwenVisionConfig, build: Build, *, rngs: nnx.Rngs, norm_merged: bool
    ) -> None:
        """``norm_merged``: the norm is over the whole block, not over each patch."""
        wide = cfg.hidden_size * cfg.merged
        self.norm = norm(cfg, wide if norm_merged else cfg.hidden_size, build)
        self.linear_fc1 = Linear(wide, wide, build, use_bias=True, rngs=rngs)
        self.linear_fc2 = Linear(wide, cfg.out_hidden_size, build, use_bias=True, rngs=rngs)
        self.norm_merged, self.merged = norm_merged, cfg.merged

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, P, D] -> [B, P / merged, out]."""
        blocks = (x.shape[0], x.shape[1] // self.merged, self.merged * x.shape[2])
        x = self.norm(x.reshape(blocks)) if self.norm_merged else self.norm(x).reshape(blocks)
        return self.linear_fc2(exact_gelu(self.linear_fc1(x)))
