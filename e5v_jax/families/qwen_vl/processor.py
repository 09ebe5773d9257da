"""Images and texts to batches: patches at an image's own resolution, and each token's position."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from e5v_jax.data.images import Size, load_image
from e5v_jax.data.text import (
    IMAGE_BUCKETS,
    bucket_length,
    encode_batch,
    expand_image_tokens,
    pad_right,
)
from e5v_jax.families.base import Batch, BatchShape, Measured
from e5v_jax.families.qwen_vl.config import QwenVLConfig
from e5v_jax.families.qwen_vl.model import ImageBatch
from e5v_jax.families.qwen_vl.patches import PatchedImage, cut_patches
from e5v_jax.families.qwen_vl.positions import position_ids
from e5v_jax.families.qwen_vl.resize import resize_steps
from e5v_jax.families.qwen_vl.vision import Patches
from e5v_jax.families.qwen_vl.vision_config import QWEN3
from e5v_jax.families.text.processor import TextProcessor
from e5v_jax.presets import E5_V, Preset

if TYPE_CHECKING:  # which takes a second
    from transformers import PreTrainedTokenizerFast

PATCH_BUCKETS = (208, 384, 640, 768, 1216, 1728, 2432, 3456, 5120, 7200)
"""Patches of 16 pixels that images are padded to. Fine where photographs of data sets are (224 x
224 has 196, 500 x 375 has 768, 640 x 480 has 1200), and at both caps: 1280 and 1800 tokens."""
OLD_PATCH_BUCKETS = (256, 448, 704, 960, 1152, 1664, 2176, 2944, 4096, 5120, 7168)
"""The same of 14 pixels: there they have 256, 936 or at least 1064, and 1564."""
_TEXT_LENGTHS = (16, 32, *(size * 2**power for power in range(4, 14) for size in (3, 4)))
"""Positions that texts are padded to: fewer than other families', which have no tower's shapes."""
MIN_TOKENS = 4
MAX_TOKENS, OLD_MAX_TOKENS = 1800, 1280
"""Of an image: of Qwen3-VL as its authors' scripts have it, of those before it as transformers'
image processor has it by default. The model folder's image processor may say otherwise, in pixels,
and a preset goes before that."""
_BESIDE = (0, 32, 96, 224, 480, *(2**power for power in range(10, 15)))
"""The same of the tokens beside an image's, those of its bare prompt not counted."""
_FINE = 512  # positions up to which they are a multiple of 16, else of 128


@dataclass(frozen=True)
class Prepared:
    """One input with an image, ready for the device."""

    ids: list[int]  # the image's placeholder expanded
    start: int  # of the image's tokens
    image: PatchedImage


class QwenVLProcessor(TextProcessor):
    """The :class:`e5v_jax.families.base.Processor` of Qwen-VL; the shape key is the patches."""

    config: QwenVLConfig
    image_text = "<|vision_start|><|image_pad|><|vision_end|>"
    shape_unit = "patches"
    any_size = True
    text_buckets = _TEXT_LENGTHS

    def __init__(
        self,
        config: QwenVLConfig,
        tokenizer: "PreTrainedTokenizerFast",
        template: str | None = None,
        preset: Preset = E5_V,
    ) -> None:
        """Raise ValueError: the template cannot be told, or a least size of images is no less than
        the most, or as :func:`match_tokenizer`.
        """
        super().__init__(match_tokenizer(config, tokenizer), tokenizer, template, preset)
        self.image_text = preset.image_text or type(self).image_text
        self.resize = _resize(config, preset)
        """The sizes that an image of a size (height, width) is resized to, one after the other."""

    def measure_image(self, size: Size) -> tuple[int, int]:
        """(tokens, padded patches) of an image of ``size`` (height, width) pixels."""
        size = self.preset.first_size(size) or size
        patches, bucket = _count_patches(self.config, size, self.resize)
        return patches // self.config.vision.merged, bucket

    @property
    def load(self) -> Callable[[Measured], Any]:
        """See :attr:`e5v_jax.families.base.Processor.load`."""
        return partial(load, config=self.config, preset=self.preset, resize=self.resize)

    @cached_property
    def _beside(self) -> int:
        """Tokens beside an image's when there is no text."""
        bare = self.fill(self.preset.choose(), None, has_image=True)
        (ids,) = encode_batch(self.tokenizer, [bare], last_token=self.preset.last_token)
        return len(ids) - 1

    def padded_length(self, length: int, shape_key: int) -> int:
        """See :meth:`e5v_jax.families.base.Processor.padded_length`.

        All images of a bucket take what its largest takes with its prompt: one program.
        """
        if shape_key:
            tokens = shape_key // self.config.vision.merged
            return _padded(tokens + self._beside, length - tokens - self._beside)
        return super().padded_length(length, shape_key)

    def stack(self, items: Sequence[Any], shape: BatchShape) -> Batch:
        """See :meth:`e5v_jax.families.base.Processor.stack`."""
        if not shape.shape_key:
            return super().stack(items, shape)
        vision, rows = self.config.vision, len(items)
        ids = [[0] if item is None else item.ids for item in items]
        input_ids, last_index = pad_right(ids, shape.length, pad_id=0)
        pixels = np.zeros((rows, shape.shape_key, 3 * vision.patch_size**2), np.uint8)
        place = np.full((rows, shape.shape_key, 2), -1, np.int16)
        grid = np.ones((rows, 2), np.int32)
        image_index = np.full((rows, shape.length), -1, np.int32)
        positions = np.zeros((rows, shape.length, 3), np.int32)
        for row, item in enumerate(items):
            if item is None:
                continue
            count, image = len(item.image.pixels), item.image
            pixels[row, :count], place[row, :count] = image.pixels, image.place
            grid[row] = image.grid
            tokens = count // vision.merged
            image_index[row, item.start + image.order] = np.arange(tokens)
            side = vision.spatial_merge_size
            own = (image.grid[0] // side, image.grid[1] // side)
            positions[row, : len(item.ids)] = position_ids(len(item.ids), item.start, own)
        input_ids = np.where(image_index >= 0, 0, input_ids)  # `<|image_pad|>` may have no row
        first_index = None
        if self.preset.pooling == "mean":  # of the image and the marks around it
            first_index = np.argmax(image_index >= 0, axis=1).astype(np.int32)
            first_index = np.maximum(first_index - 1, 0)
            last_index = first_index + 1 + (image_index >= 0).sum(axis=1, dtype=np.int32)
        return ImageBatch(
            input_ids,
            last_index,
            image_index,
            None if self.preset.positions == "1d" else positions,
            Patches(pixels, place, grid),
            first_index,
        )


def image_shape(config: QwenVLConfig, size: Size, beside: int) -> tuple[int, int]:
    """See :attr:`e5v_jax.families.base.Family.image_shape`; the limits are those without preset."""
    _, bucket = _count_patches(config, size, _resize(config, E5_V))
    return _padded(bucket // config.vision.merged + beside, 0), bucket


def pixel_limits(config: QwenVLConfig, preset: Preset) -> tuple[int, int]:
    """Least and most pixels of an image. Raises ValueError: no number of pixels is within both."""
    token = config.vision.factor**2  # pixels
    most = MAX_TOKENS if config.vision.model_type == QWEN3 else OLD_MAX_TOKENS
    least = preset.min_pixels or config.min_pixels or MIN_TOKENS * token
    most = preset.max_pixels or config.max_pixels or most * token
    if least > most:  # one may be an option's, the other the folder's
        raise ValueError(f"min_pixels {least}: expected at most max_pixels, {most}")
    return least, most


def _resize(config: QwenVLConfig, preset: Preset) -> Callable[[Size], list[Size]]:
    """What gives the sizes that an image is resized to, one after the other."""
    limits = [pixel_limits(config, preset)]
    if preset.first_pixels is not None:
        limits.insert(0, preset.first_pixels)
    return partial(resize_steps, factor=config.vision.factor, limits=tuple(limits))


def _count_patches(
    config: QwenVLConfig, size: Size, resize: Callable[[Size], list[Size]]
) -> tuple[int, int]:
    """(patches, what they are padded to) of an image; raises ValueError: more than any bucket."""
    vision = config.vision
    buckets = PATCH_BUCKETS if vision.model_type == QWEN3 else OLD_PATCH_BUCKETS
    height, width = resize(size)[-1]
    patches = (height // vision.patch_size) * (width // vision.patch_size)
    if patches > buckets[-1]:
        raise ValueError(
            f"an image of {size[1]}x{size[0]} pixels would have {patches} patches, at most "
            f"{buckets[-1]} are supported: give a smaller max_pixels"
        )
    return patches, bucket_length(patches, buckets)


def _padded(length: int, more: int) -> int:
    """Positions for an image of ``length`` tokens with its prompt, and a text of ``more``."""
    length += bucket_length(more, _BESIDE)
    return -(-length // 16) * 16 if length <= _FINE else bucket_length(length, IMAGE_BUCKETS)


def load(
    item: Measured, config: QwenVLConfig, preset: Preset, resize: Callable[[Size], list[Size]]
) -> Prepared | list[int]:
    """Decode, resize and cut an input's image, if any. Raises ValueError: it cannot be decoded."""
    if item.image is None or item.image_size is None:
        return item.ids
    vision = config.vision
    first_size = preset.first_size(item.image_size)
    image = load_image(item.image, first_size, transparency=preset.transparency)
    size = (image.height, image.width)
    if first_size is None and size != item.image_size:
        raise ValueError(
            f"the image's header says {item.image_size} (height, width), its data {size}: save it "
            "again"
        )
    *first, size = resize(size)
    for height, width in first:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    patched = cut_patches(
        image,
        size,
        patch=vision.patch_size,
        merge=vision.spatial_merge_size,
        window=vision.window_side,
    )
    token, count = config.image_token_id, len(patched.pixels) // vision.merged
    start = item.ids.index(token)
    return Prepared(expand_image_tokens(item.ids, token, [count]), start, patched)


def match_tokenizer(config: QwenVLConfig, tokenizer: "PreTrainedTokenizerFast") -> QwenVLConfig:
    """``config`` as it is. Raises ValueError: the tokenizer has other ids for its tokens."""
    known = tokenizer.added_tokens_encoder
    for name, string in (
        ("image_token_id", "<|image_pad|>"),
        ("vision_start_token_id", "<|vision_start|>"),
        ("vision_end_token_id", "<|vision_end|>"),
    ):
        if (found := known.get(string)) != (expected := getattr(config, name)):
            has = "not a token" if found is None else f"token {found}"
            raise ValueError(
                f"{string} is {has} of the tokenizer, but {name} in config.json is {expected}: "
                "they belong to different models"
            )
    return config
