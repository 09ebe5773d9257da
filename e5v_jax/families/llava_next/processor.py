"""Images and texts to batches: ``<image>`` in the tokenizer, tiles, and each token's feature."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import AddedToken

from e5v_jax.data.images import Size, load_image
from e5v_jax.data.text import IMAGE_BUCKETS, bucket_length, expand_image_tokens, pad_right
from e5v_jax.families.base import Batch, BatchShape, Measured
from e5v_jax.families.llava_next.config import ORIGINAL_IMAGE_TOKEN, LlavaNextConfig
from e5v_jax.families.llava_next.model import ImageBatch
from e5v_jax.families.llava_next.shrinking import Blend, shrink, shrunk_size
from e5v_jax.families.llava_next.tiling import (
    NEWLINE,
    feature_map_size,
    image_token_index,
    num_image_tokens,
    select_best_resolution,
    tile_image,
)
from e5v_jax.families.text.processor import TextProcessor
from e5v_jax.presets import E5_V, Preset
from e5v_jax.prompts import IMAGE_PLACEHOLDER

if TYPE_CHECKING:  # which takes a second
    from transformers import PreTrainedTokenizerFast

# Where pinpoints are many, few programs: tiles and positions that images are padded to. A tile that
# only pads costs the tower a fifteenth of what the tokens of one cost the decoder.
TILE_BUCKETS = (2, 3, 5, 7, 10, 13, 19, 26, 37)
LENGTH_STEP = 512


@dataclass(frozen=True)
class Prepared:
    """One input with an image, ready for the device."""

    ids: list[int]  # image placeholders expanded
    image_index: np.ndarray  # int32 [len(ids)]: -1 text, k tile feature, T*P newline
    tiles: np.ndarray  # uint8 [T, S, S, 3], or fp [T, P, Dv], see ImageBatch
    blend: Blend | None = None  # of all positions, where the feature map is made smaller


class LlavaNextProcessor(TextProcessor):
    """The :class:`e5v_jax.families.base.Processor` of LLaVA-NeXT; the shape key is the tiles."""

    config: LlavaNextConfig
    shape_unit = "tiles"

    def __init__(
        self,
        config: LlavaNextConfig,
        tokenizer: "PreTrainedTokenizerFast",
        template: str | None = None,
        preset: Preset = E5_V,
    ) -> None:
        """A tokenizer that does not know ``<image>`` learns it here.

        Raises ValueError: the template cannot be told, or as :func:`match_tokenizer`.
        """
        super().__init__(match_tokenizer(config, tokenizer), tokenizer, template, preset)

    def measure_image(self, size: Size) -> tuple[int, int]:
        """(tokens, tiles) of an image of ``size`` (height, width) pixels."""
        return measure_image(self.config, self.preset.first_size(size) or size)

    @property
    def load(self) -> Callable[[Measured], Any]:
        """See :attr:`e5v_jax.families.base.Processor.load`."""
        return partial(load, config=self.config, preset=self.preset)

    def padded_length(self, length: int, shape_key: int) -> int:
        """See :meth:`e5v_jax.families.base.Processor.padded_length`."""
        if shape_key:
            return padded_length(self.config, length)
        return super().padded_length(length, shape_key)

    def stack(self, items: Sequence[Any], shape: BatchShape) -> Batch:
        """See :meth:`e5v_jax.families.base.Processor.stack`."""
        if not shape.shape_key:
            return super().stack(items, shape)
        vision, rows = self.config.vision, len(items)
        ids = [[0] if item is None else item.ids for item in items]
        input_ids, last_index = pad_right(ids, shape.length, pad_id=0)
        size = vision.image_size
        tile = next((item.tiles[0] for item in items if item), np.zeros((size, size, 3), np.uint8))
        tiles = np.zeros((rows, shape.shape_key, *tile.shape), tile.dtype)
        image_index = np.full((rows, shape.length), -1, np.int32)
        each = self.config.tile_tokens
        newline = shape.shape_key * each  # of the batch: behind the features of all
        four = (rows, shape.length, 4)
        blend_index, weights = np.full(four, -1, np.int32), np.zeros(four, np.float32)
        for row, item in enumerate(items):
            if item is not None:
                tiles[row, : len(item.tiles)] = item.tiles
                own, length = len(item.tiles) * each, len(item.ids)
                index = np.where(item.image_index == own, newline, item.image_index)
                image_index[row, :length] = index
                blend_index[row, :length, 0], weights[row, :length, 0] = index, 1
                if item.blend is not None:
                    index, weights[row, :length] = item.blend
                    blend_index[row, :length] = np.where(index == own, newline, index)
        input_ids = np.where(image_index >= 0, 0, input_ids)  # `<image>` may have no row
        batch = ImageBatch(input_ids, last_index, image_index, tiles.reshape(-1, *tile.shape))
        if not self.config.can_shrink(shape.shape_key):
            return batch
        return batch._replace(blend_index=blend_index, weights=weights)


def measure_image(config: LlavaNextConfig, size: Size) -> tuple[int, int]:
    """(tokens, tiles) of an image of ``size`` (height, width) pixels, tiles that pad included."""
    vision, grid = config.vision, config.image_grid_pinpoints
    height, width = select_best_resolution(size, grid)
    tiles = 1 + (height // vision.image_size) * (width // vision.image_size)
    if config.max_tiles is not None:
        tiles = next((bucket for bucket in TILE_BUCKETS if bucket >= tiles), tiles)
    return num_image_tokens(size, **_geometry(config), max_tiles=config.max_tiles), tiles


def padded_length(config: LlavaNextConfig, length: int) -> int:
    """What an input with an image is padded to. Raises ValueError: it is longer than any."""
    length = bucket_length(length, IMAGE_BUCKETS)
    return length if config.max_tiles is None else -(-length // LENGTH_STEP) * LENGTH_STEP


def image_shape(config: LlavaNextConfig, size: Size, beside: int) -> tuple[int, int]:
    """See :attr:`e5v_jax.families.base.Family.image_shape`."""
    tokens, tiles = measure_image(config, size)
    return padded_length(config, tokens + beside), tiles


def _geometry(config: LlavaNextConfig) -> dict[str, Any]:
    vision = config.vision
    token = vision.patch_size * config.spatial_pool_stride  # pixels
    sides = {"image_size": vision.image_size, "patch_size": token}
    return {"grid_pinpoints": config.image_grid_pinpoints, **sides}


def load(item: Measured, config: LlavaNextConfig, preset: Preset) -> Prepared | list[int]:
    """Decode, resize and tile an input's image, if any. Raises ValueError: it cannot be decoded."""
    if item.image is None or item.image_size is None:
        return item.ids
    size = preset.first_size(item.image_size) or item.image_size
    tiles = _cut(item, config, preset) if item.features is None else item.features
    rows = image_token_index(size, **_geometry(config))
    blend = None
    if config.max_tiles is not None:
        map_size = feature_map_size(size, **_geometry(config))
        new = shrunk_size(map_size, config.tile_side, config.max_tiles)
        if new != map_size:
            blend = shrink(rows, map_size, new)
            rows = blend.features[:, 0]
    start = item.ids.index(config.image_token_id)
    expanded = expand_image_tokens(item.ids, config.image_token_id, [len(rows)])
    newline = len(tiles) * config.tile_tokens  # the row after the last tile feature

    def placed(rows: np.ndarray) -> np.ndarray:
        """Of tokens of the image, the same among those of the input."""
        found = np.full((len(expanded), *rows.shape[1:]), -1, np.int32)
        found[start : start + len(rows)] = np.where(rows == NEWLINE, newline, rows)
        return found

    if blend is not None:
        weights = np.zeros((len(expanded), 4), np.float32)
        weights[start : start + len(rows)] = blend.weights
        blend = Blend(placed(blend.features), weights)
    return Prepared(expanded, placed(rows), tiles, blend)


def _cut(item: Measured, config: LlavaNextConfig, preset: Preset) -> np.ndarray:
    """The tiles of an input's image, uint8 [T, S, S, 3]; raises ValueError: as :func:`load`."""
    assert item.image is not None and item.image_size is not None
    resize = preset.first_size(item.image_size)
    tiled = tile_image(
        load_image(item.image, resize),
        image_size=config.vision.image_size,
        grid_pinpoints=config.image_grid_pinpoints,
    )
    if resize is None and tiled.original_size != item.image_size:
        raise ValueError(
            f"the image's header says {item.image_size} (height, width), its data "
            f"{tiled.original_size}: save it again"
        )
    return tiled.tiles


def match_tokenizer(
    config: LlavaNextConfig, tokenizer: "PreTrainedTokenizerFast"
) -> LlavaNextConfig:
    """``config`` with ``image_token_id`` the tokenizer's ``<image>``.

    The original LLaVA code tokenises around the image, so its tokenizers do not know ``<image>``.
    Such a one gets it added here; any free id serves, as the row of an image is never read.

    Raises ValueError: config and tokenizer do not agree on its id.
    """
    original = config.image_token_id == ORIGINAL_IMAGE_TOKEN
    found: int | None = tokenizer.added_tokens_encoder.get(IMAGE_PLACEHOLDER)
    if found is None:
        tokenizer.add_tokens([AddedToken(IMAGE_PLACEHOLDER, special=True)], special_tokens=True)
        found = tokenizer.added_tokens_encoder[IMAGE_PLACEHOLDER]
    elif not original and config.image_token_id != found:
        raise ValueError(
            f"{IMAGE_PLACEHOLDER} is token {found} of the tokenizer, but image_token_id in "
            f"config.json is {config.image_token_id}: they belong to different models"
        )
    return dataclasses.replace(config, image_token_id=found)
