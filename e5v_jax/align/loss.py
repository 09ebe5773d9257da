"""Next-token loss on captions: mean cross-entropy over all caption tokens of a batch."""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from e5v_jax.families.base import Array, Batch
from e5v_jax.nn.decoder import Decoder, Packing
from e5v_jax.nn.remat import Remat
from e5v_jax.train.step import Key, in_chunks


class CaptionBatch(NamedTuple):
    """Images with a caption or several behind each, and what is to be predicted where.

    ``inputs`` alone knows of pixels, so that features could stand there.
    """

    inputs: Batch  # B sequences
    label_index: Array  # int32 [B, T], the positions whose next token is predicted
    labels: Array  # int32 [B, T], those tokens; -1 is none
    packing: Packing | None = None  # of an image's captions, where a row has several


class CaptionModel(Protocol):
    """A decoder whose head is its embedding table."""

    language_model: Decoder

    def hidden_states(
        self,
        batch: Any,
        *,
        packing: Packing | None = None,
        remat: Remat = "none",
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """The final-norm output at all positions, [B, L, D]."""


class Sums(NamedTuple):
    """Over the labels of some rows: fp32 scalars."""

    loss: jax.Array
    right: jax.Array  # predictions that score highest
    labels: jax.Array  # how many there are


def caption_loss(
    model: Any, batch: CaptionBatch, key: Key, *, chunk_size: int | None, remat: Remat
) -> tuple[jax.Array, jax.Array]:
    """Loss and share of right tokens, over all labels of the batch alike; ``key`` is of dropout.

    With a ``chunk_size`` the images go through the model :func:`in_chunks`: the sums are those of
    the whole batch, and so is the gradient.
    """
    sums = caption_sums(model, batch, key, chunk_size=chunk_size, remat=remat)
    return sums.loss / sums.labels, sums.right / sums.labels


def caption_sums(
    model: Any, batch: CaptionBatch, key: Key, *, chunk_size: int | None, remat: Remat
) -> Sums:
    """What :func:`caption_loss` divides."""
    size = batch.labels.shape[0]

    def work(batch: CaptionBatch, key: Key) -> Sums:
        return _sums(model, batch, remat=remat, dropout_key=key)

    if chunk_size is None or size <= chunk_size:
        return work(batch, key)
    sums: Sums = in_chunks(work, batch, key, size=size, chunk_size=chunk_size)
    return jax.tree.map(jnp.sum, sums)


def _sums(model: CaptionModel, batch: CaptionBatch, *, remat: Remat, dropout_key: Key) -> Sums:
    decoder = model.language_model
    x = model.hidden_states(
        batch.inputs, packing=batch.packing, remat=remat, dropout_key=dropout_key
    )  # [B, L, D]
    x = jnp.take_along_axis(x, jnp.asarray(batch.label_index)[..., None], axis=1)  # [B, T, D]
    table = decoder.embed_tokens[...].astype(x.dtype)  # [V, D]
    logits = jnp.einsum(
        "btd,vd->btv",
        x,
        table,
        precision=decoder.precision.matmul,
        preferred_element_type=jnp.float32,
    )
    labels = jnp.asarray(batch.labels)
    seen = labels >= 0  # [B, T]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
    right = seen & (jnp.argmax(logits, axis=-1) == labels)
    return Sums(
        jnp.sum(jnp.where(seen, losses, 0)),
        jnp.sum(right, dtype=jnp.float32),
        jnp.sum(seen, dtype=jnp.float32),
    )
