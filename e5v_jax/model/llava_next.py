"""LLaVA-NeXT as an embedding model: tower, projector, anyres merge, decoder, pooled last token."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from e5v_jax.config import ModelConfig
from e5v_jax.model.clip import ClipVision, exact_gelu
from e5v_jax.model.layers import Linear, LoRAConfig, Precision
from e5v_jax.model.llama import Llama, Remat, take

Array = jax.Array | np.ndarray
"""Batches are built in NumPy and placed on devices as they are."""


class TextBatch(NamedTuple):
    """Right-padded token sequences."""

    input_ids: Array  # int32 [B, L]
    last_index: Array  # int32 [B], position of the last real token


class ImageBatch(NamedTuple):
    """Token sequences in which some positions are image features."""

    input_ids: Array  # int32 [B, L]; 0 where image_index >= 0
    last_index: Array  # int32 [B]
    image_index: Array  # int32 [B, L]: -1 = text, i < K*P = feature i of its tiles, K*P = newline
    tiles: Array  # uint8 [B*K, S, S, 3], K for each row


class Projector(nnx.Module):
    """Two linear maps with bias around an exact GELU."""

    def __init__(self, cfg: ModelConfig, *, precision: Precision, rngs: nnx.Rngs) -> None:
        assert cfg.vision is not None
        v, d = cfg.vision.hidden_size, cfg.text.hidden_size
        self.linear_1 = Linear(v, d, use_bias=True, precision=precision, rngs=rngs)
        self.linear_2 = Linear(d, d, use_bias=True, precision=precision, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[T, P, Dv] -> [T, P, D]."""
        return self.linear_2(exact_gelu(self.linear_1(x)))


class LlavaNext(nnx.Module):
    """The whole model; without a vision config, or with ``load_vision`` off, only the decoder.

    Training on text pairs uses ``load_vision=False``: the tower is neither read nor placed.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        *,
        precision: Precision,
        rngs: nnx.Rngs,
        lora: LoRAConfig | None = None,
        load_vision: bool = True,
    ) -> None:
        self.language_model = Llama(cfg.text, precision=precision, lora=lora, rngs=rngs)
        self.has_vision = cfg.vision is not None and load_vision
        precision = dataclasses.replace(precision, quantization=None)  # only the decoder is large
        if cfg.vision is not None and load_vision:
            self.vision_tower = ClipVision(
                cfg.vision, cfg.num_vision_layers, precision=precision, rngs=rngs
            )
            self.multi_modal_projector = Projector(cfg, precision=precision, rngs=rngs)
            newline = jax.nn.initializers.normal(0.02)(
                rngs.params(), (cfg.text.hidden_size,), jnp.dtype(precision.param)
            )
            self.image_newline = nnx.Param(newline)

    def image_features(self, tiles: Array, batch_size: int) -> jax.Array:
        """uint8 tiles [B*K, S, S, 3] -> [B, K*P + 1, D]: projected patches, then the newline."""
        features = self.multi_modal_projector(self.vision_tower(tiles))  # [B*K, P, D]
        features = features.reshape(batch_size, -1, features.shape[-1])  # [B, K*P, D]
        newline = self.image_newline[...].astype(features.dtype)  # [D]
        newline = jnp.broadcast_to(newline, (batch_size, 1, newline.shape[0]))
        return jnp.concatenate([features, newline], axis=1)

    def merge(self, batch: ImageBatch) -> jax.Array:
        """Decoder inputs [B, L, D]: a gather from token embeddings and image features."""
        x = self.language_model.embed(batch.input_ids)  # [B, L, D]
        features = self.image_features(batch.tiles, x.shape[0])  # [B, K*P + 1, D]
        is_image = batch.image_index >= 0  # [B, L]
        index = jnp.maximum(batch.image_index, 0)[..., None]  # [B, L, 1]
        # row by row: on several devices each gathers from its own images only
        image = jnp.take_along_axis(features, index, axis=1)  # [B, L, D]
        return jnp.where(is_image[..., None], image, x)

    def __call__(
        self,
        batch: TextBatch | ImageBatch,
        *,
        remat: Remat = "none",
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """Embed a batch -> fp32 [B, D]: final-norm output at the last token, not yet normalised."""
        x = self._decoder_inputs(batch)
        x = self.language_model(x, remat=remat, dropout_key=dropout_key)  # [B, L, D]
        pooled = take(x, jnp.asarray(batch.last_index))  # [B, D]
        return self.language_model.norm(pooled).astype(jnp.float32)

    def encode(self, batch: TextBatch | ImageBatch) -> jax.Array:
        """The same vectors [B, D] without what only training needs: see :meth:`Llama.at`."""
        x = self._decoder_inputs(batch)
        pooled = self.language_model.at(x, jnp.asarray(batch.last_index))  # [B, D]
        return self.language_model.norm(pooled).astype(jnp.float32)

    def _decoder_inputs(self, batch: TextBatch | ImageBatch) -> jax.Array:
        if isinstance(batch, ImageBatch):
            return self.merge(batch)
        return self.language_model.embed(batch.input_ids)  # [B, L, D]


def l2_normalize(x: jax.Array) -> jax.Array:
    """Unit vectors along the last axis, fp32 (``torch.nn.functional.normalize``: eps 1e-12)."""
    x = x.astype(jnp.float32)
    norm = jnp.linalg.norm(x, axis=-1, keepdims=True)
    return x / jnp.maximum(norm, 1e-12)
