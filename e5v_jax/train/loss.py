"""InfoNCE over in-batch positives and hard negatives (paper section 3.3, SimCSE eq. 5)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from e5v_jax.nn.layers import l2_normalize


class InfoNCE(NamedTuple):
    """Loss and accuracy of a batch, fp32 scalars."""

    loss: jax.Array
    accuracy: jax.Array  # share of anchors whose positive scores highest


def info_nce(
    anchor: jax.Array,
    positive: jax.Array,
    hard_negative: jax.Array | None,
    *,
    temperature: float,
    excluded: jax.Array | None = None,
) -> InfoNCE:
    """Cross-entropy of each anchor's positive among all positives and all hard negatives.

    All are fp32 unit vectors [B, D], row i of each belongs to anchor i; plain pairs have no
    ``hard_negative``. ``temperature`` divides the cosines. ``excluded``, bool [B, 2B] or [B, B],
    marks candidates that are no negatives of an anchor. Under ``jit`` on a mesh B is the global
    batch: negatives are shared across all devices.
    """
    hard = [] if hard_negative is None else [hard_negative]
    candidates = jnp.concatenate([positive, *hard])  # [2B, D]
    logits = jnp.matmul(anchor, candidates.T, precision=jax.lax.Precision.HIGHEST)  # cosines, fp32
    logits = logits / temperature  # [B, 2B]
    if excluded is not None:
        logits = jnp.where(excluded, -jnp.inf, logits)
    labels = jnp.arange(anchor.shape[0])
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    accuracy = jnp.mean((jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32))
    return InfoNCE(loss, accuracy)


def contrastive_loss(
    vectors: jax.Array,
    *,
    columns: int,
    temperature: float,
    text_ids: jax.Array | None = None,
    matryoshka_dims: tuple[int, ...] = (),
    bidirectional: bool = False,
) -> InfoNCE:
    """:func:`info_nce` of pooled vectors, with what embedding trainers add to it.

    ``vectors`` are fp32 [columns * B, D], not normalised: all sent0, then sent1, then hard_neg.
    ``columns`` is 3 for triplets, 2 for plain pairs. ``text_ids``, int32 [columns * B], equal where
    the inputs are, leave out candidates that say the same as an anchor or its positive.
    ``matryoshka_dims`` make it the mean of the losses of the first d dimensions for each d, and of
    all (Kusupati et al. 2022, arXiv 2205.13147); ``bidirectional`` the mean of each and that of
    each positive's anchor among all anchors.
    """
    excluded = None
    if text_ids is not None:
        anchor, positive, *_ = jnp.split(text_ids, columns)
        candidates = text_ids[len(anchor) :]
        same = (candidates == anchor[:, None]) | (candidates == positive[:, None])
        own = jnp.eye(len(anchor), len(candidates), dtype=bool)
        excluded = same & ~own  # [B, 2B], but for its own positive
    losses = []
    for dim in (*matryoshka_dims, vectors.shape[1]):
        anchor, positive, *rest = jnp.split(l2_normalize(vectors[:, :dim]), columns)  # [B, dim]
        hard = rest[0] if rest else None
        forward = info_nce(anchor, positive, hard, temperature=temperature, excluded=excluded)
        loss = forward.loss
        if bidirectional:
            back = None if excluded is None else excluded[:, : anchor.shape[0]].T
            backward = info_nce(positive, anchor, None, temperature=temperature, excluded=back)
            loss = (loss + backward.loss) / 2
        losses.append(loss)
    # the last accuracy is that of all dimensions
    return InfoNCE(jnp.mean(jnp.stack(losses)), forward.accuracy)
