"""Attention within the windows of Qwen2.5-VL's tower.

A window is a square of patches; those at the right and lower edge of an image are what is left. The
patches of one stand together (patches.py), so the windows of a block of as many patches as a whole
one has are in it and the blocks beside it: attention is a reshape, over three times the keys that a
window has. That costs 2 % of a layer, where padding each window to its full size would make a
photograph of 500 x 375 pixels 37 % larger, in all layers.
"""

import jax
import jax.numpy as jnp

from e5v_jax.nn.attention import attend_block
from e5v_jax.nn.layers import Precision


def window_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    window: jax.Array,
    *,
    size: int,
    precision: Precision,
) -> jax.Array:
    """Attention of q over k, v [B, P, N, H] within windows -> [B, P, N, H].

    ``window`` int32 [B, P] is the window of each patch. Those of one stand together, at most
    ``size`` of them; padding is a window of its own, of any length, whose result means nothing.
    """
    b, p, n, h = q.shape
    blocks = -(-p // size)
    short = blocks * size - p

    def cut(x: jax.Array, beside: int, fill: int) -> jax.Array:
        """[B, P, ...] -> [B, blocks, size, ...], with ``beside`` blocks of ``fill`` around."""
        width = [(0, 0), (beside * size, short + beside * size), *[(0, 0)] * (x.ndim - 2)]
        return jnp.pad(x, width, constant_values=fill).reshape(b, -1, size, *x.shape[2:])

    def near(x: jax.Array, fill: int = 0) -> jax.Array:
        """[B, P, ...] -> [B, blocks, 3 * size, ...]: each block between those beside it."""
        wide = cut(x, 1, fill)
        return jnp.concatenate([wide[:, :-2], wide[:, 1:-1], wide[:, 2:]], axis=2)

    own, around = cut(window, 0, -1), near(window, -1)
    visible = own[..., :, None] == around[..., None, :]  # [B, blocks, size, 3 * size]
    # what pads the last block sees what pads everything: a softmax over nothing is not finite
    out = attend_block(
        cut(q, 0, 0).reshape(-1, size, n, h),
        near(k).reshape(-1, 3 * size, n, h).transpose(0, 2, 1, 3),
        near(v).reshape(-1, 3 * size, n, h).transpose(0, 2, 1, 3),
        visible.reshape(-1, 1, 1, size, 3 * size),
        precision,
    )  # [B * blocks, size, N, H]
    return out.reshape(b, blocks * size, n, h)[:, :p]
