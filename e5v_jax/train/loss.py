"""InfoNCE over in-batch positives and hard negatives (paper section 3.3, SimCSE eq. 5)."""

import jax
import jax.numpy as jnp
import optax


def info_nce(
    anchor: jax.Array,
    positive: jax.Array,
    hard_negative: jax.Array | None,
    *,
    temperature: float,
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy of each anchor's positive among all positives and all hard negatives.

    Args:
        anchor: fp32 unit vectors [B, D].
        positive: fp32 unit vectors [B, D]; row i belongs to anchor i.
        hard_negative: fp32 unit vectors [B, D], or None for plain pairs.
        temperature: divides the cosines; 0.05 in the paper.

    Returns:
        Mean loss and the share of anchors whose positive scores highest, both fp32 scalars. Under
        ``jit`` on a mesh B is the global batch: negatives are shared across all devices.
    """
    candidates = positive
    if hard_negative is not None:
        candidates = jnp.concatenate([positive, hard_negative])  # [2B, D]
    logits = jnp.matmul(anchor, candidates.T, precision=jax.lax.Precision.HIGHEST)  # cosines, fp32
    logits = logits / temperature  # [B, 2B]
    labels = jnp.arange(anchor.shape[0])
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    accuracy = jnp.mean((jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32))
    return loss, accuracy
