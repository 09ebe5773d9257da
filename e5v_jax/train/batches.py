"""From sentences to the arrays of a step: tokenise once, sort each batch into length groups."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerFast

from e5v_jax.data.pairs import Triplets
from e5v_jax.data.pipeline import number_texts
from e5v_jax.data.text import encode_batch, pad_right, truncate_texts
from e5v_jax.model.llava_next import TextBatch
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
from e5v_jax.train.step import PairBatch


@dataclass(frozen=True)
class PairTokens:
    """Token ids of every sentence inside its prompt."""

    ids: list[list[list[int]]]  # [column][row] -> token ids; 3 columns for triplets, 2 for pairs
    lengths: np.ndarray  # int64 [columns, rows]
    text_ids: np.ndarray  # int32 [columns, rows], equal where two sentences are

    @property
    def columns(self) -> int:
        """3 for (sent0, sent1, hard_neg), 2 for (sent0, sent1)."""
        return len(self.ids)


def tokenize_pairs(
    triplets: Triplets, tokenizer: PreTrainedTokenizerFast, cfg: DataConfig, template_name: str
) -> PairTokens:
    """Cut each sentence to ``cfg.max_tokens``, fill the prompt, tokenise (paper section 4.1).

    Raises:
        ValueError: a sentence that holds a special token; names file, row and column.
    """
    template = TEMPLATES[template_name]
    forbidden = forbidden_pattern(tokenizer, template)
    columns = {"sent0": triplets.sent0, "sent1": triplets.sent1}
    if triplets.hard_neg is not None:
        columns["hard_neg"] = triplets.hard_neg
    if cfg.prompt == "released":
        fill_in, prompt = fill_released, PLAIN
    else:
        fill_in, prompt = fill, PROMPTS.get(cfg.prompt, cfg.prompt)
        if "<sent>" not in prompt or IMAGE_PLACEHOLDER in prompt:
            raise ValueError(
                f"data.prompt: {cfg.prompt!r} is no prompt for texts; expected text, plain, sts, "
                "released, or one of your own with <sent> in it"
            )
    ids = []
    for column, texts in columns.items():
        for row, text in enumerate(texts):
            try:
                check_text(text, forbidden)
            except TextError as error:
                raise ValueError(f"{triplets.row_ids[row]}: {column}: {error}") from None
        cut = truncate_texts(tokenizer, texts, cfg.max_tokens)
        filled = [fill_in(prompt, template=template, text=text) for text in cut]
        ids.append(encode_batch(tokenizer, filled))
    numbers = number_texts([text for texts in columns.values() for text in texts])
    return PairTokens(
        ids=ids,
        lengths=np.array([[len(x) for x in column] for column in ids]),
        text_ids=numbers.astype(np.int32).reshape(len(ids), -1),
    )


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
    the chunk size.
    """
    caps: np.ndarray | None = None
    for rows in batches:
        ordered = np.sort(lengths[:, rows], axis=None)
        ends = np.array(_group_bounds(ordered.size, groups, multiple)[1:]) - 1
        caps = ordered[ends] if caps is None else np.maximum(caps, ordered[ends])
    if caps is None:
        raise ValueError("fewer rows than one batch: lower batch_size or add data")
    return tuple(int(c) for c in caps)


def make_pair_batch(
    tokens: PairTokens, rows: np.ndarray, *, lengths: tuple[int, ...], pad_id: int, multiple: int
) -> PairBatch:
    """The step's arrays for the given rows (NumPy; all sent0, then sent1, then hard_neg)."""
    sequences = [column[row] for column in tokens.ids for row in rows]
    by_length = np.argsort([len(s) for s in sequences], kind="stable")
    bounds = _group_bounds(len(sequences), len(lengths), multiple)
    groups = []
    for length, start, end in zip(lengths, bounds[:-1], bounds[1:], strict=True):
        members = [sequences[i] for i in by_length[start:end]]
        groups.append(TextBatch(*pad_right(members, length, pad_id)))
    return PairBatch(
        groups=tuple(groups),
        order=np.argsort(by_length).astype(np.int32),
        text_ids=tokens.text_ids[:, rows].reshape(-1),
    )
