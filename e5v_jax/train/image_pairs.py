"""Image columns of training pairs: measured once, decoded when their batch comes."""

import re
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerFast

from e5v_jax.config import ModelConfig
from e5v_jax.data.pairs import Side
from e5v_jax.data.text import truncate_texts
from e5v_jax.encode.arrays import stack
from e5v_jax.encode.inputs import (
    Input,
    InputError,
    Measured,
    Prepared,
    PromptChoice,
    load,
    measure,
)
from e5v_jax.model.llava_next import ImageBatch

_MULTIPLE = 128  # of which a padded length is one: what TPU's splash attention takes


def measure_side(
    side: Side,
    row_ids: Sequence[str],
    *,
    cfg: ModelConfig,
    tokenizer: PreTrainedTokenizerFast,
    template: str,
    forbidden: re.Pattern[str],
    max_tokens: int,
) -> list[Measured]:
    """Tokens and tiles of each image, with its text if there is one; only headers are read.

    Raises:
        ValueError: one line naming row and column: a model without vision, a text with a special
            token, no such image or none that Pillow knows.
    """
    assert side.images is not None
    inputs: list[Input] = list(side.images)
    if side.texts is not None:
        texts = truncate_texts(tokenizer, side.texts, max_tokens)
        inputs = [
            {"text": text, "image": image} for text, image in zip(texts, side.images, strict=True)
        ]
    try:
        return measure(
            inputs,
            cfg=cfg,
            tokenizer=tokenizer,
            choice=PromptChoice(template),
            forbidden=forbidden,
        )
    except InputError as error:
        raise ValueError(f"{row_ids[error.position]}: {side.column}: {error.reason}") from None


@dataclass(frozen=True)
class ImageGroup:
    """How one side's images become a batch: the same shape in every step."""

    items: list[Measured]
    """Of all rows."""
    length: int
    """Positions a row is padded to."""
    num_tiles: int
    """Tiles a row is padded to."""

    @staticmethod
    def of(items: list[Measured]) -> "ImageGroup":
        """With room for the longest of ``items`` and the one of most tiles."""
        longest = max(item.length for item in items)
        return ImageGroup(
            items, -(-longest // _MULTIPLE) * _MULTIPLE, max(item.num_tiles for item in items)
        )

    def batch(
        self,
        rows: np.ndarray,
        *,
        cfg: ModelConfig,
        pool: Executor,
        wanted: np.ndarray,
        row_ids: Sequence[str],
    ) -> ImageBatch:
        """The arrays of some rows, decoded where ``wanted`` (bool [B]); others are black.

        Raises:
            ValueError: a broken image; names row and file.
        """

        def decode(row: int) -> Prepared:
            try:
                return load(self.items[row], cfg)
            except ValueError as error:
                raise ValueError(f"{row_ids[row]}: {error}") from None

        assert cfg.vision is not None
        size = cfg.vision.image_size
        elsewhere = Prepared(  # on another process
            ids=[0],
            image_index=np.full(1, -1, np.int32),
            tiles=np.zeros((0, size, size, 3), np.uint8),
            patches=cfg.vision.num_patches,
        )
        decoded = pool.map(decode, rows[wanted])
        prepared = [next(decoded) if here else elsewhere for here in wanted]
        batch = stack(prepared, self.length, num_tiles=self.num_tiles, pad_id=0)
        assert isinstance(batch, ImageBatch)
        return batch
