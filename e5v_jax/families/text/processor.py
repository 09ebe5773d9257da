"""Texts to token sequences; families that embed more build on this."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from e5v_jax.data.images import Size, image_size
from e5v_jax.data.inputs import ImageSource, Input, InputError, split_input
from e5v_jax.data.text import TEXT_BUCKETS, bucket_length, encode_batch, pad_right, truncate_texts
from e5v_jax.families.base import Batch, BatchShape, Measured, ModelConfig
from e5v_jax.families.text.model import TextBatch
from e5v_jax.presets import E5_V, Preset
from e5v_jax.prompts import (
    IMAGE_PLACEHOLDER,
    TEMPLATES,
    PromptChoice,
    check_text,
    detect_template,
    forbidden_pattern,
)


class TextProcessor:
    """The :class:`e5v_jax.families.base.Processor` of a decoder."""

    image_text = IMAGE_PLACEHOLDER
    """What stands for an image in a filled prompt; it holds one placeholder token."""
    shape_unit = "images"
    any_size = False
    """Whether images keep their own size, within the preset's limits."""
    preset: Preset = E5_V

    def __init__(
        self,
        config: ModelConfig,
        tokenizer: PreTrainedTokenizerFast,
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

        accepted = list(tried(enumerate(inputs), self._accept))  # (position, text, image)
        if max_tokens is not None:
            texts = [text for _, text, _ in accepted if text is not None]
            cut = iter(truncate_texts(self.tokenizer, texts, max_tokens))
            accepted = [(i, text and next(cut), image) for i, text, image in accepted]
        filled = list(tried(accepted, partial(self._fill, prompts)))  # (position, image, string)
        all_ids = encode_batch(
            self.tokenizer, [string for *_, string in filled], last_token=self.preset.last_token
        )
        rows = ((*row[:2], ids) for row, ids in zip(filled, all_ids, strict=True))
        return list(tried(rows, self._measure))

    @property
    def end_of_turn(self) -> str | None:
        """See :attr:`e5v_jax.families.base.Processor.end_of_turn`."""
        found = re.search(r"<\|[^|]+\|>", self._chat.partition("{}")[2])
        eos: str | None = self.tokenizer.eos_token
        return found.group() if found else eos

    def check_text(self, text: str) -> None:
        """See :meth:`e5v_jax.families.base.Processor.check_text`."""
        check_text(text, self._forbidden)

    def _accept(self, position: int, item: Input) -> tuple[int, str | None, Any]:
        text, image = split_input(item)
        if image is not None and "image" not in self.config.modalities:
            raise ValueError("this is a text-only model: it cannot embed images")
        if text is not None:
            self.check_text(text)
        return position, text, image

    def fill(self, prompts: PromptChoice, text: str | None, *, has_image: bool) -> str:
        """See :meth:`e5v_jax.families.base.Processor.fill`."""
        return prompts.fill(text, has_image=has_image, template=self._chat, image=self.image_text)

    def _fill(
        self, prompts: PromptChoice, position: int, text: str | None, image: Any
    ) -> tuple[int, Any, str]:
        has_image = image is not None
        string = self.fill(prompts, text, has_image=has_image)
        return position, (image, image_size(image)) if has_image else None, string

    def _measure(
        self, position: int, image: tuple[ImageSource | str, Size] | None, ids: list[int]
    ) -> Measured:
        length, shape_key, rows = len(ids), 0, self.config.text.vocab_size
        if max(ids) >= rows:  # on the device it would be another token's vector
            for token in set(ids) - {self.config.image_token_id}:
                if token >= rows:
                    name = self.tokenizer.convert_ids_to_tokens(token)
                    raise ValueError(
                        f"token {name!r} has id {token}, but the embedding table has {rows} rows: "
                        "the tokenizer is of another model"
                    )
        if image is not None:
            tokens, shape_key = self.measure_image(image[1])
            length += tokens - 1
        text = self.config.text
        if length > text.max_length:
            window = text.max_length < text.max_position_embeddings
            limit = f"{text.max_length}{' (its sliding_window)' if window else ''}"
            raise ValueError(f"{length} tokens, the model takes at most {limit}: shorten the text")
        return Measured(position, ids, length, shape_key, *(image or ()))

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
        return bucket_length(length, TEXT_BUCKETS)

    def stack(self, items: Sequence[Any], shape: BatchShape) -> Batch:
        """See :meth:`e5v_jax.families.base.Processor.stack`."""
        ids = [[0] if item is None else item for item in items]  # any id: padding is never seen
        input_ids, last_index = pad_right(ids, shape.length, pad_id=0)
        first_index = np.zeros_like(last_index) if self.preset.pooling == "mean" else None
        return TextBatch(input_ids, last_index, first_index)


def load_text(item: Measured) -> list[int]:
    """The token ids of a text, which needs no more work."""
    return item.ids
