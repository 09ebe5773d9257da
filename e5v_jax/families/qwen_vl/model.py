"""Qwen-VL as an embedding model: tower, merge, decoder with M-RoPE and deepstack, pooled token."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from e5v_jax.families.base import Array, Batch, BatchShape, ImageCost
from e5v_jax.families.qwen_vl.config import QwenVLConfig
from e5v_jax.families.qwen_vl.parameters import parameters
from e5v_jax.families.qwen_vl.vision import FRAMES, Patches, QwenVision
from e5v_jax.families.text.model import TextModel
from e5v_jax.families.text.model import example_batch as example_texts
from e5v_jax.nn.attention import QUERY_BLOCK
from e5v_jax.nn.decoder import Deepstack
from e5v_jax.nn.layers import Build
from e5v_jax.nn.remat import Remat


class ImageBatch(NamedTuple):
    """Token sequences with an image in each."""

    input_ids: Array  # int32 [B, L]; 0 where image_index >= 0
    last_index: Array  # int32 [B]
    image_index: Array  # int32 [B, L]: -1 = text, i = token i of the row's image
    positions: Array | None  # int32 [B, L, 3], time, row and column; None: 0, 1, 2, ...
    patches: Patches  # a row each
    first_index: Array | None = None  # int32 [B]: the mean from there to last_index is pooled


class QwenVL(TextModel):
    """The whole model; a batch of texts alone does not touch the tower."""

    def __init__(self, config: QwenVLConfig, build: Build, *, rngs: nnx.Rngs) -> None:
        super().__init__(config, build, rngs=rngs)
        tower = Build(build.precision.of_tower, build.runtime)  # only the decoder is adapted
        self.visual = QwenVision(config.vision, tower, rngs=rngs)

    def __call__(
        self, batch: Any, *, remat: Remat = "none", dropout_key: jax.Array | None = None
    ) -> jax.Array:
        """See :meth:`TextModel.__call__`."""
        if not isinstance(batch, ImageBatch):
            return super().__call__(batch, remat=remat, dropout_key=dropout_key)
        x, how = self.merge(batch)
        x = self.language_model(x, remat=remat, dropout_key=dropout_key, **how)  # [B, L, D]
        return self._pool(x, batch)

    def encode(self, batch: Any) -> jax.Array:
        """See :meth:`TextModel.encode`."""
        if not isinstance(batch, ImageBatch):
            return super().encode(batch)
        x, how = self.merge(batch)
        return self._encode(x, batch, **how)

    def merge(self, batch: ImageBatch) -> tuple[jax.Array, dict[str, Any]]:
        """Decoder inputs [B, L, D], a gather from tokens and image features, and their keywords."""
        x = self.language_model.embed(batch.input_ids)  # [B, L, D]
        features, deep = self.visual(batch.patches)  # [B, N, D], [B, J, N, D]
        image_index = jnp.asarray(batch.image_index)
        index = jnp.maximum(image_index, 0)[..., None]  # [B, L, 1]
        # row by row: on several devices each gathers from its own images only
        image = jnp.take_along_axis(features, index, axis=1)  # [B, L, D]
        deepstack = None if deep is None else Deepstack(deep, image_index)
        how = {"positions": batch.positions, "deepstack": deepstack}
        return jnp.where(image_index[..., None] >= 0, image, x), how


def build(
    config: QwenVLConfig, how: Build, *, rngs: nnx.Rngs, load_vision: bool = True
) -> TextModel:
    """The module; without ``load_vision``, as text pairs need it, the decoder alone."""
    return (QwenVL if load_vision else TextModel)(config, how, rngs=rngs)


def example_batch(config: QwenVLConfig, shape: BatchShape) -> Batch:
    """See :attr:`e5v_jax.families.base.Family.example_batch`."""
    texts = example_texts(config, shape)
    if not shape.shape_key:
        return texts
    rows, patches = shape.rows, shape.shape_key
    return ImageBatch(
        texts.input_ids,
        texts.last_index,
        image_index=jnp.full_like(texts.input_ids, -1),
        positions=jnp.zeros((rows, shape.length, 3), jnp.int32),
        patches=Patches(
            pixels=jnp.zeros((rows, patches, 3 * config.vision.patch_size**2), jnp.uint8),
            place=jnp.zeros((rows, patches, 2), jnp.int16),
            grid=jnp.ones((rows, 2), jnp.int32),
        ),
    )


def image_cost(config: QwenVLConfig, images: int, patches: int, itemsize: int) -> ImageCost:
    """See :attr:`e5v_jax.families.base.Family.image_cost`; full attention is quadratic."""
    vision = config.vision
    d, heads = vision.hidden_size, vision.num_heads
    window = vision.window_side**2 * vision.merged  # patches
    full = len(vision.fullatt_block_indexes) if window else vision.depth
    # attention: within windows each patch's keys are those of three blocks (windows.py)
    flops = 4.0 * d * patches * (full * patches + (vision.depth - full) * 3 * window)
    for row in parameters(config).rows:
        if row.section == "vision" and row.name.endswith(".kernel"):
            seen = patches * (row.layers or 1)
            if row.transform == "conv3d":
                seen //= FRAMES  # both frames are one product
            elif "merger" in row.name:
                seen //= vision.merged
            flops += 2.0 * math.prod(row.shape) * seen
    kept = 1 + len(vision.deepstack_visual_indexes)
    wide = (4 * d + (2 + vision.kind.is_gated) * vision.intermediate_size + kept * d) * itemsize
    # fp32, before and after the softmax; of windows all blocks' at a time
    scores = 2 * 4 * heads * max(min(patches, QUERY_BLOCK), 3 * window)
    return ImageCost(images * flops, images * patches * (wide + scores))
