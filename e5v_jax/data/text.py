"""From filled prompts to token ids: tokenising, truncating, expanding images, padding, buckets.

NumPy and a fast tokenizer of transformers only; no torch, no jax.
"""

from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from e5v_jax.data.literal import LiteralTokenizer

if TYPE_CHECKING:  # which takes a second
    from transformers import PreTrainedTokenizerFast

# Fine where texts are many; beyond, at most a fifth of a sequence is padding.
_DOUBLINGS = [quarters * 2**power for power in range(5, 12) for quarters in (5, 6, 7, 8)]
# Lengths that texts are padded to, and sequences with images: from 256 on what TPU's splash
# attention takes; shorter ones are those of small models with few tokens for an image.
TEXT_BUCKETS = (16, 20, 24, 28, 32, 36, 40, 48, 56, 64, 80, 96, 112, 128, *_DOUBLINGS)
IMAGE_BUCKETS = (48, 64, 80, 96, 112, 128, 160, 192, 224, *range(256, 16385, 128))


def encode_batch(
    tokenizer: "PreTrainedTokenizerFast",
    filled: Sequence[str],
    *,
    last_token: str | None = None,
    literal: LiteralTokenizer | None = None,
) -> list[list[int]]:
    """Tokenise filled prompts (:func:`e5v_jax.prompts.fill`), unpadded and never truncated.

    Each is tokenised whole, with a BOS if the tokenizer's own post-processor adds it, as the
    reference does. Something after the prompt, say EOS, would be the pooled token. With
    ``last_token`` that is the pooled one: each prompt ends in it already, and nothing is added.
    ``literal`` is given for prompts that are marked for it.

    Raises ValueError: the tokenizer puts something else around the prompt, or ``last_token`` is
    none of its tokens or not the last one.
    """
    if not filled:
        return []
    bare = literal.encode(filled) if literal else _encode(tokenizer, filled)
    if last_token is None:
        # What the post-processor adds is the same for every text, so one text tells.
        before = _added_before(tokenizer, filled[0])
        return [before + ids for ids in bare]
    expected = tokenizer.added_tokens_encoder.get(last_token)
    if expected is None:
        raise ValueError(
            f"the embedding is read at {last_token}, which the tokenizer does not know: it is of "
            "another model"
        )
    for string, ids in zip(filled, bare, strict=True):
        if not ids or ids[-1] != expected:
            raise ValueError(
                f"the embedding is read at {last_token}, but the prompt ends in {string[-20:]!r}: "
                "take the preset's template"
            )
    return bare


def _encode(tokenizer: "PreTrainedTokenizerFast", texts: Sequence[str]) -> list[list[int]]:
    """Tokenise without what the post-processor adds."""
    ids: list[list[int]] = tokenizer(
        list(texts),
        add_special_tokens=False,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        verbose=False,
    )["input_ids"]
    return ids


def _added_before(tokenizer: "PreTrainedTokenizerFast", prompt: str) -> list[int]:
    """What the post-processor puts before a prompt: nothing or the BOS. Raises ValueError: else."""
    (bare,) = _encode(tokenizer, [prompt])
    whole: list[int] = tokenizer(prompt, padding=False, truncation=False, verbose=False)[
        "input_ids"
    ]
    if not bare:
        raise ValueError(f"the tokenizer finds no token in the prompt {prompt!r}")
    before, after = whole[: -len(bare)], whole[-len(bare) :]
    if after != bare:
        raise ValueError(
            f"the tokenizer adds {tokenizer.convert_ids_to_tokens(after[-1])!r} after the prompt, "
            "but the embedding is read at the template's last token: set add_eos_token to false in "
            "tokenizer_config.json"
        )
    if before not in ([], [tokenizer.bos_token_id]):
        raise ValueError(
            f"the tokenizer adds {tokenizer.convert_ids_to_tokens(before)} before the prompt, "
            f"expected nothing or the BOS token {tokenizer.bos_token!r}, as bos_token in "
            "tokenizer_config.json says"
        )
    return before


def truncate_texts(
    tokenizer: "PreTrainedTokenizerFast", texts: Sequence[str], max_tokens: int = 32
) -> list[str]:
    """Cut each text to ``max_tokens`` tokens, special ones not counted, and decode what is left.

    As the authors' training script (ft_llm.py), which does this before it fills the template; every
    text is decoded, also a short one. Spaces are left alone: transformers 4 also removed those
    before punctuation, transformers 5 does not.

    Raises ValueError: ``max_tokens`` is not positive.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}, expected at least 1")
    if not texts:
        return []
    # Cut here and not by the tokenizer: its truncation is state shared by all threads.
    cut = [sequence[:max_tokens] for sequence in _encode(tokenizer, texts)]
    return tokenizer.batch_decode(cut, clean_up_tokenization_spaces=False)


def expand_image_tokens(
    ids: Sequence[int], image_token_id: int, counts: Sequence[int]
) -> list[int]:
    """Repeat the k-th image placeholder ``counts[k]`` times (reference: LlavaNextProcessor).

    Raises ValueError: there are not as many placeholders as counts, or a count is below 1.
    """
    placeholders = list(ids).count(image_token_id)
    if placeholders != len(counts):
        raise ValueError(
            f"the prompt has {placeholders} image placeholders (token {image_token_id}) for "
            f"{len(counts)} images"
        )
    if any(count < 1 for count in counts):
        raise ValueError(f"image token counts are {list(counts)}, expected at least 1 each")
    remaining = iter(counts)
    runs = ([token] * (next(remaining) if token == image_token_id else 1) for token in ids)
    return list(chain.from_iterable(runs))


def bucket_length(length: int, buckets: Sequence[int]) -> int:
    """Choose the smallest of ``buckets``, in any order, that holds ``length`` tokens.

    Raises ValueError: none does. Nothing is ever cut to fit.
    """
    smallest = min((bucket for bucket in buckets if bucket >= length), default=None)
    if smallest is None:
        raise ValueError(
            f"a sequence of {length} tokens fits none of the length buckets {sorted(buckets)}: "
            "shorten the input or add a longer bucket"
        )
    return smallest


def pad_right(
    sequences: Sequence[Sequence[int]], length: int, pad_id: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Stack sequences into int32 [B, length]; also int32 [B], the last real token of each.

    With a causal decoder that token never sees the padding, so no mask is needed.

    Raises ValueError: a sequence is empty or longer than ``length``.
    """
    input_ids = np.full((len(sequences), length), pad_id, np.int32)  # [B, L]
    for row, sequence in enumerate(sequences):
        if not 0 < len(sequence) <= length:
            raise ValueError(f"sequence {row} has {len(sequence)} tokens, expected 1 to {length}")
        input_ids[row, : len(sequence)] = sequence
    return input_ids, np.array([len(sequence) - 1 for sequence in sequences], np.int32)
