"""What a user may pass to ``encode``, turned into token ids and tiles."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import PreTrainedTokenizerFast

from e5v_jax.config import ModelConfig
from e5v_jax.data.images import (
    NEWLINE,
    Size,
    image_size,
    image_token_index,
    load_image,
    num_image_tokens,
    select_best_resolution,
    tile_image,
)
from e5v_jax.data.text import encode_batch, expand_image_tokens
from e5v_jax.prompts import PROMPTS, check_text, fill, slots

ImageSource = Image.Image | Path | bytes
Input = str | ImageSource | Mapping[str, Any]
"""A str is a text; a PIL image, a Path or bytes an image; a mapping has text, image or both."""


class InputError(ValueError):
    """A bad input of a call to ``encode``."""

    def __init__(self, position: int, reason: str) -> None:
        """``position`` counts from 0; ``reason`` is one line without it."""
        super().__init__(f"input {position}: {reason}")
        self.position = position
        self.reason = reason


@dataclass(frozen=True)
class Measured:
    """One item whose place in a batch is known: tokenised, its image not yet decoded."""

    position: int  # in the call
    ids: list[int]  # one placeholder for the image
    length: int  # tokens, the image's included
    source: ImageSource | str | None = None
    image_size: Size | None = None  # pixels (height, width)
    num_tiles: int = 0


@dataclass(frozen=True)
class Prepared:
    """One item, ready for the device."""

    ids: list[int]  # image placeholders expanded
    image_index: np.ndarray | None = None  # int32 [len(ids)]: -1 text, k tile feature, T*P newline
    tiles: np.ndarray | None = None  # uint8 [T, S, S, 3]
    patches: int = 0  # P, features of one tile


@dataclass(frozen=True)
class PromptChoice:
    """Which instruction each item gets: by kind, or one for all."""

    template: str  # text with one {}
    instruction: str | None = None  # None: PROMPTS by kind

    def for_item(self, has_text: bool, has_image: bool) -> str:
        """The instruction of one item."""
        if self.instruction is not None:
            return self.instruction
        if has_text and has_image:
            return PROMPTS["text_image"]
        return PROMPTS["image" if has_image else "text"]


def choose_prompt(template: str, prompt_name: str | None, prompt: str | None) -> PromptChoice:
    """The prompt of a call: by name, by text with ``<sent>``/``<image>`` slots, or by item kind.

    Raises:
        ValueError: both given, an unknown name, or a text without any slot or with ``{type}``.
    """
    if prompt_name is not None and prompt is not None:
        raise ValueError("give prompt_name or prompt, not both")
    if prompt_name is not None:
        if prompt_name not in PROMPTS:
            raise ValueError(f"prompt_name {prompt_name!r}: expected one of {sorted(PROMPTS)}")
        prompt = PROMPTS[prompt_name]
    if prompt is not None and not slots(prompt) & {"text", "image"}:
        raise ValueError(f"prompt {prompt!r} has no slot: put <sent> for the text, <image> or both")
    if prompt is not None and "type" in slots(prompt):
        raise ValueError(
            f"prompt {prompt!r}: put a kind of garment for {{type}}, give it as prompt"
        )
    return PromptChoice(template=template, instruction=prompt)


def split_input(item: Input) -> tuple[str | None, ImageSource | str | None]:
    """(text, image source) of one input.

    Raises:
        ValueError: neither, an unknown key or an unsupported type.
    """
    if isinstance(item, str):
        return item, None
    if isinstance(item, Image.Image | Path | bytes):
        return None, item
    if isinstance(item, Mapping):
        unknown = set(item) - {"text", "image"}
        if unknown:
            raise ValueError(f"unknown key {min(unknown)!r}: expected 'text', 'image' or both")
        text, image = item.get("text"), item.get("image")
        if text is None and image is None:
            raise ValueError("neither 'text' nor 'image' is given")
        if text is not None and not isinstance(text, str):
            raise ValueError(f"'text' is a {type(text).__name__}, expected a str")
        if image is not None and not isinstance(image, str | Image.Image | Path | bytes):
            raise ValueError(
                f"'image' is a {type(image).__name__}, expected a path, bytes or a PIL image"
            )
        return text, image
    raise ValueError(
        f"unsupported input of type {type(item).__name__}: expected str, PIL image, Path, bytes or "
        "a mapping with 'text' and/or 'image'"
    )


def measure(
    inputs: Sequence[Input],
    *,
    cfg: ModelConfig,
    tokenizer: PreTrainedTokenizerFast,
    choice: PromptChoice,
    forbidden: re.Pattern[str],
    on_error: Callable[[InputError], None] | None = None,
) -> list[Measured]:
    """Fill prompts, tokenise, read the sizes of images; order kept.

    Args:
        inputs: what to embed.
        cfg: the model's.
        tokenizer: the model's.
        choice: which instruction an input gets.
        forbidden: see :func:`e5v_jax.prompts.forbidden_pattern`.
        on_error: hears of each bad input, which is then left out; without it the first one raises.

    Raises:
        InputError: a bad input; it has its position, and the message is "input 3: ...".
        ValueError: the tokenizer does not fit.
    """

    def fail(position: int, error: ValueError) -> None:
        if on_error is None:
            raise InputError(position, str(error)) from error
        on_error(InputError(position, str(error)))

    filled: list[tuple[int, str, ImageSource | str | None, Size | None]] = []
    for position, item in enumerate(inputs):
        try:
            filled.append((position, *_fill(item, choice, forbidden, cfg)))
        except ValueError as error:
            fail(position, error)
    measured = []
    all_ids = encode_batch(tokenizer, [string for _, string, _, _ in filled])
    for ids, (position, _, source, size) in zip(all_ids, filled, strict=True):
        try:
            measured.append(_measure(position, ids, source, size, cfg))
        except ValueError as error:
            fail(position, error)
    return measured


def _fill(
    item: Input, choice: PromptChoice, forbidden: re.Pattern[str], cfg: ModelConfig
) -> tuple[str, ImageSource | str | None, Size | None]:
    text, source = split_input(item)
    if source is not None and cfg.vision is None:
        raise ValueError("this is a text-only model: it cannot embed images")
    if text is not None:
        check_text(text, forbidden)
    instruction = choice.for_item(text is not None, source is not None)
    if (source is not None) != ("image" in slots(instruction)):
        have, want = ("an image", "none") if source is not None else ("no image", "one")
        raise ValueError(f"the input has {have}, the prompt {instruction!r} takes {want}")
    filled = fill(instruction, template=choice.template, text=text)
    return filled, source, None if source is None else image_size(source)


def _measure(
    position: int,
    ids: list[int],
    source: ImageSource | str | None,
    size: Size | None,
    cfg: ModelConfig,
) -> Measured:
    if size is None:
        measured = Measured(position, ids, len(ids))
    else:
        assert cfg.vision is not None and cfg.image_token_id is not None
        tokens = num_image_tokens(
            size,
            grid_pinpoints=cfg.image_grid_pinpoints,
            image_size=cfg.vision.image_size,
            patch_size=cfg.vision.patch_size,
        )
        length = len(ids) - 1 + tokens
        tiles = num_tiles(size, cfg.vision.image_size, cfg.image_grid_pinpoints)
        measured = Measured(position, ids, length, source, size, tiles)
    if measured.length > cfg.text.max_position_embeddings:
        raise ValueError(
            f"{measured.length} tokens, the model takes at most "
            f"{cfg.text.max_position_embeddings}: shorten the text"
        )
    return measured


def num_tiles(size: Size, tile_size: int, grid_pinpoints: Sequence[Size]) -> int:
    """Tiles of an image of ``size`` (height, width) pixels, the whole image's own included."""
    height, width = select_best_resolution(size, grid_pinpoints)
    return 1 + (height // tile_size) * (width // tile_size)


def load(item: Measured, cfg: ModelConfig) -> Prepared:
    """Decode and tile the image of an item, if it has one; for a worker, ahead of the device.

    Raises:
        ValueError: the image cannot be decoded.
    """
    if item.source is None:
        return Prepared(item.ids)
    assert cfg.vision is not None and cfg.image_token_id is not None
    tiled = tile_image(
        load_image(item.source),
        image_size=cfg.vision.image_size,
        grid_pinpoints=cfg.image_grid_pinpoints,
    )
    if tiled.original_size != item.image_size:
        raise ValueError(
            f"the image's header says {item.image_size} (height, width), its data "
            f"{tiled.original_size}: save it again"
        )
    rows = image_token_index(
        tiled.original_size,
        grid_pinpoints=cfg.image_grid_pinpoints,
        image_size=cfg.vision.image_size,
        patch_size=cfg.vision.patch_size,
    )
    start = item.ids.index(cfg.image_token_id)
    expanded = expand_image_tokens(item.ids, cfg.image_token_id, [len(rows)])
    newline = len(tiled.tiles) * cfg.vision.num_patches  # the row after the last tile feature
    image_index = np.full(len(expanded), -1, np.int32)
    image_index[start : start + len(rows)] = np.where(rows == NEWLINE, newline, rows)
    return Prepared(expanded, image_index, tiled.tiles, cfg.vision.num_patches)


def prepare(
    inputs: Sequence[Input],
    *,
    cfg: ModelConfig,
    tokenizer: PreTrainedTokenizerFast,
    choice: PromptChoice,
    forbidden: re.Pattern[str],
) -> list[Prepared]:
    """:func:`measure` and :func:`load` in one; all images in memory.

    Raises:
        InputError, ValueError: as :func:`measure`; a broken image is an InputError too.
    """
    prepared = []
    for item in measure(inputs, cfg=cfg, tokenizer=tokenizer, choice=choice, forbidden=forbidden):
        try:
            prepared.append(load(item, cfg))
        except ValueError as error:
            raise InputError(item.position, str(error)) from error
    return prepared
