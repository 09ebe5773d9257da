"""Texts to token sequences; families that embed more build on this."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np

from e5v_jax.data.images import Size, image_size
from e5v_jax.data.inputs import ImageSource, Input, InputError, split_input
from e5v_jax.data.literal import NO_TOKEN, LiteralTokenizer
from e5v_jax.data.text import TEXT_BUCKETS, bucket_length, encode_batch, pad_right, truncate_texts
from e5v_jax.families.base import Batch, BatchShape, Measured, ModelConfig
from e5v_jax.families.text.model import TextBatch
from e5v_jax.presets import E5_V, Preset
from e5v_jax.prompts import (
    IMAGE_PLACEHOLDER,
    TEMPLATES,
    TEXT_SLOT,
    UNREADABLE,
    PromptChoice,
    SpecialTokens,
    TextError,
    Truncate,
    check_text,
    detect_template,
    forbidden_pattern,
    special_strings,
)

if TYPE_CHECKING:  # which takes a second
    from transformers import PreTrainedTokenizerFast


@dataclass(slots=True)
class _Filled:
    """An input inside its prompt, which is tokenised later."""

    position: int  # in the call
    text: str | None
    image: ImageSource | str | None
    size: Size | None
    image_tokens: int  # instead of the placeholder; 1 without an image
    shape_key: int
    string: str
    literal: bool  # whether special tokens of the string are marked
    ids: list[int] = field(default_factory=list)
    truncated: bool = False

    @property
    def length(self) -> int:
        """Positions it takes."""
        return len(self.ids) + self.image_tokens - 1


class TextProcessor:
    """The :class:`e5v_jax.families.base.Processor` of a decoder."""

    image_text = IMAGE_PLACEHOLDER
    """What stands for an image in a filled prompt; it holds one placeholder token."""
    shape_unit = "images"
    any_size = False
    """Whether images keep their own size, within the preset's limits."""
    preset: Preset = E5_V
    text_buckets: Sequence[int] = TEXT_BUCKETS
    """The lengths that texts are padded to, ascending."""

    def __init__(
        self,
        config: ModelConfig,
        tokenizer: "PreTrainedTokenizerFast",
        template: str | None = None,
        preset: Preset = E5_V,
    ) -> None:
        """``template`` names the chat template, None takes the preset's or asks the tokenizer.

        Raises ValueError: the template cannot be told, or images would need other sizes.
        """
        if not self.any_size and (preset.min_pixels or preset.max_pixels):
            raise ValueError("min_pixels, max_pixels: this model takes no images of any size")
        self.config: Any = config
        self.tokenizer, self.preset = tokenizer, preset
        if template is None and preset.template is not None:
            preset.check_tokens(tokenizer.added_tokens_encoder)
            self.template, self._chat = preset.name, preset.template
        else:
            self.template = detect_template(tokenizer, config.text.model_type, override=template)
            self._chat = TEMPLATES[self.template]
        self._forbidden = forbidden_pattern(tokenizer, self._chat)
        self._literal = LiteralTokenizer(tokenizer, special_strings(tokenizer, self._chat))

    def measure(
        self,
        inputs: Sequence[Input],
        prompts: PromptChoice,
        *,
        max_tokens: int | None = None,
        on_error: Callable[[InputError], None] | None = None,
    ) -> list[Measured]:
        """See :meth:`e5v_jax.families.base.Processor.measure`."""

        def tried(rows: Iterable[tuple[Any, ...]], work: Callable[..., Any]) -> Iterator[Any]:
            """``work`` of each row, which starts with its position; bad rows are told or raise."""
            for position, *values in rows:
                try:
                    yield work(position, *values)
                except ValueError as error:
                    bad = InputError(position, str(error))
                    if on_error is None:
                        raise bad from error
                    on_error(bad)

        accepted = list(tried(enumerate(inputs), partial(self._accept, prompts)))
        if max_tokens is not None:
            texts = [text for _, text, _ in accepted if text is not None]
            cut = iter(truncate_texts(self.tokenizer, texts, max_tokens))
            accepted = [(i, text and next(cut), image) for i, text, image in accepted]
        rows = self._tokenise(tried(accepted, partial(self._fill, prompts)))
        if prompts.truncate != "none":
            rows = self._truncate(prompts, rows)
        return list(tried(((row.position, row) for row in rows), partial(self._measure, prompts)))

    @property
    def end_of_turn(self) -> str | None:
        """See :attr:`e5v_jax.families.base.Processor.end_of_turn`."""
        found = re.search(r"<\|[^|]+\|>", self._chat.partition("{}")[2])
        eos: str | None = self.tokenizer.eos_token
        return found.group() if found else eos

    def check_text(self, text: str, *, special_tokens: SpecialTokens = "text") -> None:
        """See :meth:`e5v_jax.families.base.Processor.check_text`."""
        check_text(text, self._forbidden if special_tokens == "refuse" else UNREADABLE)

    def longest(self, max_length: int | None) -> int:
        """See :meth:`e5v_jax.families.base.Processor.longest`."""
        most = min(self.config.text.max_length, self.text_buckets[-1])
        if max_length is not None and max_length > most:
            raise ValueError(f"max_length {max_length}: the model takes at most {most}")
        return max_length or most

    def _accept(
        self, prompts: PromptChoice, position: int, item: Input
    ) -> tuple[int, str | None, Any]:
        text, image = split_input(item)
        if image is not None and "image" not in self.config.modalities:
            raise ValueError("this is a text-only model: it cannot embed images")
        if text is not None:
            self.check_text(text, special_tokens=prompts.special_tokens)
        return position, text, image

    def fill(self, prompts: PromptChoice, text: str | None, *, has_image: bool) -> str:
        """See :meth:`e5v_jax.families.base.Processor.fill`."""
        return prompts.fill(text, has_image=has_image, template=self._chat, image=self.image_text)

    def _fill(self, prompts: PromptChoice, position: int, text: str | None, image: Any) -> _Filled:
        string, literal = self._insert(prompts, text, has_image=image is not None)
        size = None if image is None else image_size(image)
        tokens, shape_key = (1, 0) if size is None else self.measure_image(size)
        return _Filled(position, text, image, size, tokens, shape_key, string, literal)

    def _insert(
        self, prompts: PromptChoice, text: str | None, *, has_image: bool
    ) -> tuple[str, bool]:
        """What is tokenised for an input, and whether by ``self._literal``: marked for it."""
        if text is None:
            return self.fill(prompts, None, has_image=has_image), False
        try:
            frame = _frame(prompts, has_image, self._chat, self.image_text)
        except ValueError:
            self.fill(prompts, text, has_image=has_image)  # the same, and names the text
            raise
        string = prompts.insert(frame, text)
        if self._literal.may_name(frame, text):
            marked = prompts.insert(self._literal.mark(frame), text)
            if self._literal.is_needed(string, marked):
                return marked, True
        return string, False

    def _tokenise(self, rows: Iterable[_Filled]) -> list[_Filled]:
        """Give rows their ids."""
        rows = list(rows)
        for literal in (False, True):
            chosen = [i for i, row in enumerate(rows) if row.literal is literal]
            all_ids = encode_batch(
                self.tokenizer,
                [rows[i].string for i in chosen],
                last_token=self.preset.last_token,
                literal=self._literal if literal else None,
            )
            for i, ids in zip(chosen, all_ids, strict=True):
                rows[i].ids = ids
        return rows

    def _truncate(self, prompts: PromptChoice, rows: list[_Filled]) -> list[_Filled]:
        """Cut texts between two of their tokens, by as few as it takes for their rows to fit.

        What is left is tokenised anew, as any text of these characters is. Rows that do not fit
        without a text, or with a blank one, stay as they are.
        """
        limit = self.longest(prompts.max_length)
        whole = {row.position: row for row in rows}
        long = {i: row for i, row in whole.items() if row.text is not None and row.length > limit}
        spans = {i: self._literal.spans(row.text or "") for i, row in long.items()}
        kept = {i: len(own) for i, own in spans.items()}  # tokens of each text
        fitting: dict[int, _Filled] = {}
        while long:
            shorter = []
            for i, row in long.items():
                kept[i] -= row.length - limit
                text = _cut(whole[i].text or "", spans[i], kept[i], prompts.truncate)
                if text.strip():
                    string, literal = self._insert(prompts, text, has_image=row.image is not None)
                    shorter.append(
                        replace(row, text=text, string=string, literal=literal, truncated=True)
                    )
            cut = {row.position: row for row in self._tokenise(shorter)}
            long = {i: row for i, row in cut.items() if row.length > limit}
            fitting |= {i: row for i, row in cut.items() if i not in long}
        return [fitting.get(row.position, row) for row in rows]

    def _measure(self, prompts: PromptChoice, position: int, row: _Filled) -> Measured:
        ids, vocabulary = row.ids, self.config.text.vocab_size
        if min(ids) == NO_TOKEN:
            raise TextError(
                "the text names a special token that the tokenizer cannot read as text: remove or "
                "respell it"
            )
        if max(ids) >= vocabulary:  # on the device it would be another token's vector
            for token in set(ids) - {self.config.image_token_id}:
                if token >= vocabulary:
                    name = self.tokenizer.convert_ids_to_tokens(token)
                    raise ValueError(
                        f"token {name!r} has id {token}, but the embedding table has {vocabulary} "
                        "rows: the tokenizer is of another model"
                    )
        if row.length > self.longest(prompts.max_length):
            raise ValueError(self._too_long(prompts, row))
        return Measured(
            position, ids, row.length, row.shape_key, row.image, row.size, truncated=row.truncated
        )

    def _too_long(self, prompts: PromptChoice, row: _Filled) -> str:
        text, limit = self.config.text, self.longest(prompts.max_length)
        says = f"the model takes at most {limit}"
        if prompts.max_length is not None:
            says = f"max_length is {limit}"
        elif limit == text.max_length < text.max_position_embeddings:
            says += " (its sliding_window)"
        remedy = 'shorten the text, or let truncate="end" or "start" cut it'
        if row.text is None:
            remedy = "an image is never cut, take a smaller one"
        elif prompts.truncate != "none":
            remedy = "what stands around the text leaves no room for it"
        return f"{row.length} tokens, {says}: {remedy}"

    def measure_image(self, size: Size) -> tuple[int, int]:
        """(tokens, shape key) of an image of ``size`` (height, width) pixels.

        Raises ValueError: the model embeds no images, or none of this size.
        """
        raise ValueError("this is a text-only model: it cannot embed images")

    @property
    def load(self) -> Callable[[Measured], Any]:
        """See :attr:`e5v_jax.families.base.Processor.load`."""
        return load_text

    def padded_length(self, length: int, shape_key: int) -> int:
        """See :meth:`e5v_jax.families.base.Processor.padded_length`."""
        return bucket_length(length, self.text_buckets)

    def stack(self, items: Sequence[Any], shape: BatchShape) -> Batch:
        """See :meth:`e5v_jax.families.base.Processor.stack`."""
        ids = [[0] if item is None else item for item in items]  # any id: padding is never seen
        input_ids, last_index = pad_right(ids, shape.length, pad_id=0)
        first_index = np.zeros_like(last_index) if self.preset.pooling == "mean" else None
        return TextBatch(input_ids, last_index, first_index)


@lru_cache(maxsize=64)  # many texts have one
def _frame(prompts: PromptChoice, has_image: bool, template: str, image: str) -> str:
    """What stands around a text."""
    return prompts.fill(TEXT_SLOT, has_image=has_image, template=template, image=image)


def _cut(text: str, spans: list[tuple[int, int]], kept: int, what: Truncate) -> str:
    """``kept`` tokens of a text, which stand at ``spans`` in it; ``what`` is cut off."""
    if kept < 1:
        return ""
    return text[: spans[kept - 1][1]] if what == "end" else text[spans[-kept][0] :]


def load_text(item: Measured) -> list[int]:
    """The token ids of a text, which needs no more work."""
    return item.ids
