"""From captioned images to the arrays of a step: measured once, images decoded when due."""

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from e5v_jax.align.captions import Captions
from e5v_jax.align.config import CaptionsConfig
from e5v_jax.align.loss import CaptionBatch
from e5v_jax.data.inputs import InputError
from e5v_jax.families.base import BatchShape, Measured, Processor
from e5v_jax.nn.decoder import Packing
from e5v_jax.prompts import PromptChoice, slots

STEP = 16
"""Rows are padded to a multiple of this many positions."""


@dataclass(frozen=True)
class CaptionTokens:
    """It holds every image in its prompt and every caption, tokenised; only headers were read."""

    items: list[Measured]  # of each row, without a caption
    captions: list[list[list[int]]]  # [rows][captions of it]: ids, the end included
    shape: BatchShape  # of each step's batch but its rows
    label_count: int  # the most tokens that are predicted in a row
    packed: bool  # whether a row has all captions of its image


def tokenize_captions(data: Captions, processor: Processor, cfg: CaptionsConfig) -> CaptionTokens:
    """Fill the prompt for each image; tokenise captions apart, so that its tokens stay the same.

    Raises ValueError: a caption with a special token, an image that is none, too long a row, by
    file and row; or the field of ``cfg``.
    """
    try:
        items = processor.measure(data.images, _prompts(cfg, processor))
    except InputError as error:
        raise ValueError(f"{data.row_ids[error.position]}: {error.reason}") from None
    end = _end_id(cfg, processor)
    captions = []
    for where, texts, item in zip(data.row_ids, data.texts, items, strict=True):
        try:
            for text in texts:
                processor.check_text(text, special_tokens="refuse")
        except ValueError as error:
            raise ValueError(f"{where}: caption {text!r}: {error}") from None
        ids: list[list[int]] = processor.tokenizer(
            [text.strip() for text in texts],
            add_special_tokens=False,
            return_attention_mask=False,
            verbose=False,
        )["input_ids"]
        captions.append([[*caption, end][: cfg.max_tokens] for caption in ids])
        length, most = item.length + max(map(len, captions[-1])), processor.config.text.max_length
        if length > most:
            raise ValueError(
                f"{where}: {length} tokens with its longest caption, the model takes at most {most}"
            )
    packed = cfg.captions == "all"
    counts = [sum(map(len, own)) if packed else max(map(len, own)) for own in captions]
    longest = max(item.length + count for item, count in zip(items, counts, strict=True))
    return CaptionTokens(
        items,
        captions,
        # one shape for the run, so that it may be as small as these rows let it
        BatchShape(0, -(-longest // STEP) * STEP, max(item.shape_key for item in items)),
        max(counts),
        packed,
    )


def _prompts(cfg: CaptionsConfig, processor: Processor) -> PromptChoice:
    if cfg.prompt is None:
        return processor.preset.choose()
    if slots(cfg.prompt) != {"image"}:
        raise ValueError(
            f"data.prompt: {cfg.prompt!r}, expected one with <image> and no other slot"
        )
    return processor.preset.choose(prompt=cfg.prompt)


def _end_id(cfg: CaptionsConfig, processor: Processor) -> int:
    end = processor.end_of_turn if cfg.end is None else cfg.end
    if end is None:
        raise ValueError(
            "data.end: the tokenizer has no EOS token; name the one that ends captions"
        )
    found: int | None = processor.tokenizer.get_vocab().get(end)
    if found is None or found >= processor.config.text.vocab_size:
        raise ValueError(f"data.end: {end!r} is no token of this model; name one that is")
    return found


@dataclass(frozen=True)
class CaptionBatchMaker:
    """It makes the arrays of a step, in NumPy."""

    tokens: CaptionTokens
    processor: Processor
    wanted: np.ndarray  # bool [B], the rows of a batch whose images are needed here
    row_ids: Sequence[str]  # where a person finds each row
    pool: Executor  # decodes images
    load: Callable[[Measured], Any]  # the processor's, or of features that are known

    def __call__(self, rows: np.ndarray, which: np.ndarray) -> CaptionBatch:
        """Make the batch of rows int64 [B], each with its caption number ``which`` int64 [B].

        Where captions are packed, each has all of them. A row of -1 is left empty; so is an image
        that is not wanted here.
        Raises ValueError: a broken image; names row and file.
        """
        tokens = self.tokens
        shape = (len(rows), tokens.label_count)
        index, labels = np.zeros(shape, np.int32), np.full(shape, -1, np.int32)
        segment, shift = np.zeros((2, len(rows), tokens.shape.length), np.int32)
        due = []
        for i, (row, caption) in enumerate(zip(rows.tolist(), which.tolist(), strict=True)):
            if row < 0:
                continue
            item, captions = tokens.items[row], tokens.captions[row]
            ids: list[int] = []
            for number, own in enumerate(captions if tokens.packed else [captions[caption]]):
                start, end = item.length + len(ids), item.length + len(ids) + len(own)
                labelled = slice(len(ids), len(ids) + len(own))
                # the end of the prompt predicts the first token of each
                index[i, labelled] = [item.length - 1, *range(start, end - 1)]
                labels[i, labelled] = own
                segment[i, start:end], shift[i, start:end] = number + 1, len(ids)
                ids += own
            if self.wanted[i]:
                length = item.length + len(ids)
                due.append((i, row, replace(item, ids=[*item.ids, *ids], length=length)))
        items: list[Any] = [None] * len(rows)
        for (i, *_), loaded in zip(due, self.pool.map(self._load, due), strict=True):
            items[i] = loaded
        inputs = self.processor.stack(items, replace(tokens.shape, rows=len(rows)))
        return CaptionBatch(
            inputs, index, labels, Packing(segment, shift) if tokens.packed else None
        )

    def _load(self, due: tuple[int, int, Measured]) -> Any:
        _, row, item = due
        try:
            return self.load(item)
        except ValueError as error:
            raise ValueError(f"{self.row_ids[row]}: {error}") from None
