"""From pairs to the arrays of a step: tokenise once, sort each batch's texts by length."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
from transformers import PreTrainedTokenizerFast

from e5v_jax.config import ModelConfig
from e5v_jax.data.pairs import Side, TrainingPairs
from e5v_jax.data.pipeline import number_inputs
from e5v_jax.data.text import encode_batch, pad_right, truncate_texts
from e5v_jax.model.llava_next import ImageBatch, TextBatch
from e5v_jax.prompts import (
    IMAGE_PLACEHOLDER,
    PLAIN,
    PROMPTS,
    TEMPLATES,
    TextError,
    check_text,
    fill,
    fill_released,
    forbidden_pattern,
)
from e5v_jax.train.config import DataConfig
from e5v_jax.train.image_pairs import ImageGroup, measure_side
from e5v_jax.train.step import PairBatch

MakeImages = Callable[[ImageGroup, np.ndarray], ImageBatch]
"""Gets a column's images and the row numbers, int64 [B]."""


@dataclass(frozen=True)
class PairTokens:
    """Token ids of every input inside its prompt."""

    ids: list[list[list[int]]]  # [column][row] -> token ids; 3 columns for triplets, 2 for pairs
    lengths: np.ndarray  # int64 [columns, rows], the positions of images counted
    text_ids: np.ndarray  # int32 [columns, rows], equal where two inputs are
    images: dict[int, ImageGroup] = field(default_factory=dict)
    """By column; the ids there have one placeholder for the image."""

    @property
    def columns(self) -> int:
        """3 for triplets, 2 for pairs."""
        return len(self.ids)

    @property
    def text_columns(self) -> list[int]:
        """Those without images."""
        return [column for column in range(self.columns) if column not in self.images]


def tokenize_pairs(
    triplets: TrainingPairs,
    tokenizer: PreTrainedTokenizerFast,
    cfg: DataConfig,
    template_name: str,
    model: ModelConfig,
) -> PairTokens:
    """Cut each sentence to ``cfg.max_tokens``, fill the prompt, tokenise (paper section 4.1).

    Images get the prompts of images; of each, only the header is read.

    Raises:
        ValueError: a sentence that holds a special token, an image that is none, a model without
            vision; names file, row and column.
    """
    template = TEMPLATES[template_name]
    forbidden = forbidden_pattern(tokenizer, template)
    ids: list[list[list[int]]] = []
    lengths = []
    images = {}
    for side in triplets.sides:
        if side.images is None:
            ids.append(_tokenize_side(side, triplets.row_ids, tokenizer, cfg, template, forbidden))
            lengths.append([len(x) for x in ids[-1]])
            continue
        items = measure_side(
            side,
            triplets.row_ids,
            cfg=model,
            tokenizer=tokenizer,
            template=template,
            forbidden=forbidden,
            max_tokens=cfg.max_tokens,
        )
        images[len(ids)] = ImageGroup.of(items)
        ids.append([item.ids for item in items])
        lengths.append([item.length for item in items])
    return PairTokens(
        ids=ids,
        lengths=np.array(lengths),
        text_ids=number_inputs(triplets.sides).astype(np.int32).reshape(len(ids), -1),
        images=images,
    )


def _tokenize_side(
    side: Side,
    row_ids: list[str],
    tokenizer: PreTrainedTokenizerFast,
    cfg: DataConfig,
    template: str,
    forbidden: re.Pattern[str],
) -> list[list[int]]:
    """Token ids of the sentences of a side without images."""
    if cfg.prompt == "released":
        fill_in, prompt = fill_released, PLAIN
    else:
        fill_in, prompt = fill, PROMPTS.get(cfg.prompt, cfg.prompt)
        if "<sent>" not in prompt or IMAGE_PLACEHOLDER in prompt:
            raise ValueError(
                f"data.prompt: {cfg.prompt!r} is no prompt for texts; expected text, plain, sts, "
                "released, or one of your own with <sent> in it"
            )
    texts = side.texts or []
    for row, text in enumerate(texts):
        try:
            check_text(text, forbidden)
        except TextError as error:
            raise ValueError(f"{row_ids[row]}: {side.column}: {error}") from None
    cut = truncate_texts(tokenizer, texts, cfg.max_tokens)
    return encode_batch(tokenizer, [fill_in(prompt, template=template, text=x) for x in cut])


def _group_bounds(count: int, groups: int, multiple: int) -> list[int]:
    """``groups + 1`` cut points of ``count`` sentences, each a multiple of ``multiple``."""
    if count % multiple:
        raise ValueError(
            f"{count} sentences a step cannot be split into parts of {multiple} (the devices that "
            f"share a batch, or chunk_size): make the one a multiple of the other"
        )
    units = count // multiple
    groups = min(groups, units)
    return [units * g // groups * multiple for g in range(groups + 1)]


def group_lengths(
    lengths: np.ndarray, batches: Iterable[np.ndarray], *, groups: int, multiple: int
) -> tuple[int, ...]:
    """The padded length of each group: the longest any batch of the run needs there.

    Fixed for the run, so that the step compiles once. ``lengths`` is [columns, rows]; ``batches``
    are row indices; group sizes are multiples of ``multiple``: the devices that share a batch, or
    the chunk size. Without columns there are no groups.
    """
    if not len(lengths):
        return ()
    caps: np.ndarray | None = None
    for rows in batches:
        ordered = np.sort(lengths[:, rows], axis=None)
        ends = np.array(_group_bounds(ordered.size, groups, multiple)[1:]) - 1
        caps = ordered[ends] if caps is None else np.maximum(caps, ordered[ends])
    if caps is None:
        raise ValueError("fewer rows than one batch: lower batch_size or add data")
    return tuple(int(c) for c in caps)


def make_pair_batch(
    tokens: PairTokens,
    rows: np.ndarray,
    *,
    lengths: tuple[int, ...],
    pad_id: int,
    multiple: int,
    make_images: MakeImages | None = None,
) -> PairBatch:
    """The step's arrays for the given rows, in NumPy.

    First the texts of all columns, sorted into ``lengths`` groups, then each column of images as a
    group of its own, which ``make_images`` makes.
    """
    texts = [(column, row) for column in tokens.text_columns for row in range(len(rows))]
    sequences = [tokens.ids[column][rows[row]] for column, row in texts]
    by_length = np.argsort([len(s) for s in sequences], kind="stable")
    bounds = _group_bounds(len(sequences), len(lengths), multiple) if lengths else [0]
    groups: list[TextBatch | ImageBatch] = []
    for length, start, end in zip(lengths, bounds[:-1], bounds[1:], strict=True):
        members = [sequences[i] for i in by_length[start:end]]
        groups.append(TextBatch(*pad_right(members, length, pad_id)))
    inputs = [texts[i] for i in by_length]  # (column, row) in the order of the groups
    for column, images in tokens.images.items():
        assert make_images is not None
        groups.append(make_images(images, rows))
        inputs += [(column, row) for row in range(len(rows))]
    places = np.array([column * len(rows) + row for column, row in inputs])
    return PairBatch(
        groups=tuple(groups),
        order=np.argsort(places).astype(np.int32),
        text_ids=tokens.text_ids[:, rows].reshape(-1),
    )
