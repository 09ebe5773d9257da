"""A decoder as an embedding model: the pooled last token after the final norm."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from e5v_jax.families.base import Array, BatchShape, ModelConfig
from e5v_jax.nn.decoder import Decoder, Remat, take
from e5v_jax.nn.layers import Build


class TextBatch(NamedTuple):
    """Right-padded token sequences."""

    input_ids: Array  # int32 [B, L]
    last_index: Array  # int32 [B], position of the last real token


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
        """Embed a batch -> fp32 [B, D]: final-norm output at the last token, not yet normalised."""
        x = self.decoder_inputs(batch)
        x = self.language_model(x, remat=remat, dropout_key=dropout_key)  # [B, L, D]
        pooled = take(x, jnp.asarray(batch.last_index))  # [B, D]
        return self.language_model.norm(pooled).astype(jnp.float32)

    def encode(self, batch: Any) -> jax.Array:
        """The same vectors [B, D] without what only training needs: see :meth:`Decoder.at`."""
        x = self.decoder_inputs(batch)
        pooled = self.language_model.at(x, jnp.asarray(batch.last_index))  # [B, D]
        return self.language_model.norm(pooled).astype(jnp.float32)

    def decoder_inputs(self, batch: Any) -> jax.Array:
        """What the decoder runs over, [B, L, D]: here the embeddings of the tokens."""
        return self.language_model.embed(batch.input_ids)  # [B, L, D]
