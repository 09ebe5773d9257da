"""From pairs to the arrays of a step: measured once, sorted by length, images decoded when due."""

from collections.abc import Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from itertools import pairwise, repeat
from typing import Any

import numpy as np

from e5v_jax.data.inputs import Input, InputError
from e5v_jax.data.pairs import TrainingPairs
from e5v_jax.data.pipeline import number_inputs
from e5v_jax.families.base import Batch, BatchShape, Measured, Processor
from e5v_jax.presets import Preset
from e5v_jax.prompts import PLAIN, PromptChoice
from e5v_jax.train.config import DataConfig
from e5v_jax.train.step import PairBatch


@dataclass(frozen=True)
class PairTokens:
    """It holds every input inside its prompt, tokenised; of an image, only the header was read."""

    items: list[list[Measured]]  # [column][row]; 3 columns for triplets, 2 for pairs
    lengths: np.ndarray  # int64 [columns, rows], the positions of images counted
    text_ids: np.ndarray  # int32 [columns, rows], equal where two inputs are
    image_shapes: dict[int, BatchShape]  # column with images -> of each step's batch but its rows

    @property
    def columns(self) -> int:
        """Count the columns: 3 for triplets, 2 for pairs."""
        return len(self.items)

    @property
    def text_columns(self) -> list[int]:
        """List the columns without images."""
        return [column for column in range(self.columns) if column not in self.image_shapes]


def tokenize_pairs(pairs: TrainingPairs, processor: Processor, cfg: DataConfig) -> PairTokens:
    """Cut sentences to ``cfg.max_tokens``, fill the prompts, tokenise (paper section 4.1).

    Raises ValueError: a sentence that is no text, an image that is none, a model without
    vision; names file, row and column.
    """
    items, image_shapes = [], {}
    for column, side in enumerate(pairs.sides):
        texts, images = side.texts, side.images
        inputs: Sequence[Input] = images or texts or []
        if texts is not None and images is not None:
            inputs = [{"text": t, "image": i} for t, i in zip(texts, images, strict=True)]
        preset = processor.preset
        prompts = _prompts(cfg.prompt, preset) if images is None else preset.choose()
        try:
            measured = processor.measure(inputs, prompts, max_tokens=cfg.max_tokens)
        except InputError as error:
            row = pairs.row_ids[error.position]
            raise ValueError(f"{row}: {side.column}: {error.reason}") from None
        items.append(measured)
        if images is not None:
            key = max(item.shape_key for item in measured)
            length = processor.padded_length(max(item.length for item in measured), key)
            image_shapes[column] = BatchShape(0, length, key)
    return PairTokens(
        items=items,
        lengths=np.array([[item.length for item in column] for column in items]),
        text_ids=number_inputs(pairs.sides).astype(np.int32).reshape(len(items), -1),
        image_shapes=image_shapes,
    )


def common_beginning(items: Iterable[Iterable[Measured]]) -> int:
    """Count the tokens that all texts begin with; the last one of a text, which is pooled, is none.

    ``items`` are columns of rows.
    """
    sequences = [item.ids for column in items for item in column]
    first, last = min(sequences), max(sequences)  # between them, in order, are all others
    same = next(
        (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first)
    )
    return min(same, min(map(len, sequences)) - 1)


def _prompts(name: str, preset: Preset) -> PromptChoice:
    """What ``data.prompt`` says for texts."""
    if name == "released":
        return PromptChoice(PLAIN, released=True)
    try:
        prompt = preset.with_text_prompt(name).document.text
        return preset.choose(prompt=None if name == "text" else prompt)
    except ValueError as error:
        raise ValueError(f"data.prompt: {error}") from error


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
    """Find the padded length of each group: the longest any batch of the run needs there.

    They are fixed for the run, so that the step compiles once. ``lengths`` is [columns, rows],
    ``batches`` are row indices; for ``multiple`` see :func:`e5v_jax.train.feed.group_multiple`.
    """
    if not len(lengths):
        return ()
    needed = []
    for rows in batches:
        ordered = np.sort(lengths[:, rows], axis=None)
        needed.append([ordered[e - 1] for e in _group_bounds(ordered.size, groups, multiple)[1:]])
    if not needed:
        raise ValueError("fewer rows than one batch: lower batch_size or add data")
    return tuple(int(longest) for longest in np.max(needed, axis=0))


@dataclass(frozen=True)
class BatchMaker:
    """It makes the arrays of a step, in NumPy, from its row numbers, and keeps what steps share."""

    tokens: PairTokens  # all rows
    processor: Processor
    lengths: tuple[int, ...]  # of the groups of texts, see :func:`group_lengths`
    multiple: int  # the size of a group is one of it
    wanted: np.ndarray  # bool [B], the rows of a batch whose images are needed here
    row_ids: Sequence[str]  # where a person finds each row
    pool: Executor  # decodes images

    def __call__(self, rows: np.ndarray) -> PairBatch:
        """Make the batch of rows int64 [B].

        First come the texts of all columns, sorted into groups of similar length, then each column
        of images as a group of its own; an image that is not wanted here is left empty.

        Raises ValueError: a broken image; names row and file.
        """
        tokens, lengths = self.tokens, self.lengths
        places = np.arange(tokens.columns * len(rows)).reshape(tokens.columns, len(rows))
        texts = places[tokens.text_columns].reshape(-1)
        texts = texts[np.argsort(tokens.lengths[:, rows].reshape(-1)[texts], kind="stable")]
        bounds = _group_bounds(len(texts), len(lengths), self.multiple) if lengths else [0]
        groups: list[Batch] = []
        for length, (start, end) in zip(lengths, pairwise(bounds), strict=True):
            columns, numbers = np.divmod(texts[start:end], len(rows))
            items = list(map(self._load, columns, rows[numbers]))
            groups.append(self.processor.stack(items, BatchShape(len(items), length)))
        for column, shape in tokens.image_shapes.items():
            decoded = self.pool.map(self._load, repeat(column), rows[self.wanted])
            items = [next(decoded) if here else None for here in self.wanted]
            groups.append(self.processor.stack(items, shape))
        images = places[list(tokens.image_shapes)].reshape(-1)
        return PairBatch(
            groups=tuple(groups),
            order=np.argsort(np.concatenate([texts, images])).astype(np.int32),
            text_ids=tokens.text_ids[:, rows].reshape(-1),
        )

    def _load(self, column: int, row: int) -> Any:
        try:
            return self.processor.load(self.tokens.items[column][row])
        except ValueError as error:
            raise ValueError(f"{self.row_ids[row]}: {error}") from None
