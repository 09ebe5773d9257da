"""Scaled dot-product attention behind one function."""

import jax
import jax.numpy as jnp

from e5v_jax.model.layers import Precision


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, *, is_causal: bool, precision: Precision
) -> jax.Array:
    """Attention of q [B, T, N, H] over k, v [B, S, K, H] -> [B, T, N, H]; N is a multiple of K.

    Right-padded batches need no mask: under the causal one, no real token sees what is right of it.
    """
    b, t, n, h = q.shape
    s, kv_heads = k.shape[1], k.shape[2]
    q = q.reshape(b, t, kv_heads, n // kv_heads, h)  # [B, T, K, G, H]
    logits = jnp.einsum(
        "btkgh,bskh->bkgts", q, k, precision=precision.matmul, preferred_element_type=jnp.float32
    )
    logits = logits * h**-0.5  # [B, K, G, T, S], fp32 through the softmax
    if is_causal:
        visible = jnp.arange(t)[:, None] >= jnp.arange(s)[None, :]  # [T, S]
        logits = jnp.where(visible, logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    out = jnp.einsum("bkgts,bskh->btkgh", weights, v, precision=precision.matmul)
    return out.reshape(b, t, n, h)
