"""A decoder as an embedding model: the pooled last token after the final norm."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from e5v_jax.families.base import Array, BatchShape, ModelConfig, Together
from e5v_jax.nn.decoder import Decoder, Packing, take
from e5v_jax.nn.layers import Build
from e5v_jax.nn.remat import Remat


class TextBatch(NamedTuple):
    """Right-padded token sequences."""

    input_ids: Array  # int32 [B, L]
    last_index: Array  # int32 [B], position of the pooled token
    first_index: Array | None = None  # int32 [B]: the mean from there to last_index is pooled


def example_batch(config: ModelConfig, shape: BatchShape) -> TextBatch:
    """See :attr:`e5v_jax.families.base.Family.example_batch`."""
    ids = jnp.zeros((shape.rows, shape.length), jnp.int32)
    return TextBatch(ids, jnp.zeros(shape.rows, jnp.int32))


class TextModel(nnx.Module):
    """The decoder alone. For text pairs, families with more than a decoder are trained as this."""

    def __init__(
        self, config: ModelConfig, build: Build, *, rngs: nnx.Rngs, load_vision: bool = True
    ) -> None:
        """Random parameters; ``load_vision`` means nothing here."""
        self.language_model = Decoder(config.text, build, rngs=rngs)
        self.runtime = build.runtime

    def __call__(
        self, batch: Any, *, remat: Remat = "none", dropout_key: jax.Array | None = None
    ) -> jax.Array:
        """Embed a batch -> fp32 [B, D]: final-norm output of what is pooled, not yet normalised."""
        return self._pool(self._run(batch, remat=remat, dropout_key=dropout_key), batch)

    def embed_together(
        self,
        batch: Any,
        together: Together,
        *,
        remat: Remat = "none",
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """The same as a call, of texts [B, L] in rows [B / texts, beginning + texts * (L - it)].

        A text sees the beginning of its row and itself, at the positions that it has alone. Raises
        ValueError: the mean of several tokens is pooled.
        """
        if _first_index(batch) is not None:
            raise ValueError("texts in one row: only for models that pool one token")
        size, length = batch.input_ids.shape
        first, rows, own = together.beginning, size // together.texts, length - together.beginning
        x = self.decoder_inputs(batch).reshape(rows, together.texts, length, -1)
        rest = x[:, :, first:].reshape(rows, together.texts * own, -1)
        x = jnp.concatenate([x[:, 0, :first], rest], axis=1)  # [B / texts, T, D]
        text = np.repeat(np.arange(together.texts, dtype=np.int32), own)
        segment = np.concatenate([np.zeros(first, np.int32), text + 1])  # [T]
        shift = np.concatenate([np.zeros(first, np.int32), text * own])  # [T]
        packing = Packing(*(np.broadcast_to(row, (rows, len(row))) for row in (segment, shift)))
        x = self.language_model(x, packing=packing, remat=remat, dropout_key=dropout_key)
        x = x[:, first:].reshape(size, own, -1)  # [B, L - beginning, D]
        return self._pool(x, batch._replace(last_index=batch.last_index - first))

    def hidden_states(
        self,
        batch: Any,
        *,
        packing: Packing | None = None,
        remat: Remat = "none",
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """What a head would see, [B, L, D] in the compute dtype: final-norm output everywhere."""
        x = self._run(batch, packing=packing, remat=remat, dropout_key=dropout_key)
        return self.language_model.norm(x)

    def _run(self, batch: Any, **how: Any) -> jax.Array:
        """All decoder layers over a batch, with keywords of theirs: [B, L, D] before the norm."""
        return self.language_model(self.decoder_inputs(batch), **how)

    def encode(self, batch: Any) -> jax.Array:
        """The same vectors [B, D] without what only training needs: see :meth:`Decoder.at`."""
        return self._encode(self.decoder_inputs(batch), batch)

    def _encode(self, x: jax.Array, batch: Any, **how: Any) -> jax.Array:
        """Decoder inputs [B, L, D] -> [B, D]; ``how`` are the decoder's keywords."""
        if _first_index(batch) is not None:
            return self._pool(self.language_model(x, **how), batch)
        pooled = self.language_model.at(x, jnp.asarray(batch.last_index), **how)  # [B, D]
        return self.language_model.norm(pooled).astype(jnp.float32)

    def _pool(self, x: jax.Array, batch: Any) -> jax.Array:
        """Hidden states [B, L, D] -> fp32 [B, D]: one token's, or the mean of several."""
        norm, last, first = self.language_model.norm, batch.last_index, _first_index(batch)
        if first is None:
            return norm(take(x, jnp.asarray(last))).astype(jnp.float32)
        place, first, last = jnp.arange(x.shape[1]), first[:, None], last[:, None]
        seen = ((place >= first) & (place <= last))[..., None]  # [B, L, 1]
        total = jnp.where(seen, norm(x).astype(jnp.float32), 0).sum(axis=1)  # [B, D]
        return total / (last - first + 1)

    def decoder_inputs(self, batch: Any) -> jax.Array:
        """What the decoder runs over, [B, L, D]: here the embeddings of the tokens."""
        return self.language_model.embed(batch.input_ids)  # [B, L, D]


def _first_index(batch: Any) -> Array | None:
    return getattr(batch, "first_index", None)  # not the batches of every family have it
