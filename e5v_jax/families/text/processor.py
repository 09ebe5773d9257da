"""Texts to token sequences; families that embed more build on this."""

from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerFast

from e5v_jax.data.images import Size, image_size
from e5v_jax.data.inputs import ImageSource, Input, InputError, split_input
from e5v_jax.data.text import TEXT_BUCKETS, bucket_length, encode_batch, pad_right, truncate_texts
from e5v_jax.families.base import Batch, BatchShape, Measured, ModelConfig
from e5v_jax.families.text.model import TextBatch
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

    def __init__(
        self,
        config: ModelConfig,
        tokenizer: PreTrainedTokenizerFast,
        template: str | None = None,
    ) -> None:
        """``template`` names the chat template, None asks the tokenizer.

        Raises:
            ValueError: the template cannot be told.
        """
        self.config: Any = config
        self.tokenizer = tokenizer
        self.template = detect_template(tokenizer, config.text.model_type, override=template)
        self._forbidden = forbidden_pattern(tokenizer, TEMPLATES[self.template])

    def measure(
        self,
        inputs: Sequence[Input],
        prompts: PromptChoice,
        *,
        max_tokens: int | None = None,
        on_error: Callable[[InputError], None] | None = None,
    ) -> list[Measured]:
        """See :meth:`e5v_jax.families.base.Processor.measure`."""

        def fail(position: int, error: ValueError) -> None:
            if on_error is None:
                raise InputError(position, str(error)) from error
            on_error(InputError(position, str(error)))

        accepted: list[tuple[int, str | None, ImageSource | str | None]] = []
        for position, item in enumerate(inputs):
            try:
                accepted.append((position, *self._accept(item)))
            except ValueError as error:
                fail(position, error)
        if max_tokens is not None:
            texts = [text for _, text, _ in accepted if text is not None]
            cut = iter(truncate_texts(self.tokenizer, texts, max_tokens))
            accepted = [(i, text and next(cut), image) for i, text, image in accepted]
        filled: list[tuple[int, str, ImageSource | str | None, Size | None]] = []
        for position, text, image in accepted:
            try:
                string = prompts.fill(
                    text,
                    has_image=image is not None,
                    template=TEMPLATES[self.template],
                    image=self.image_text,
                )
                size = None if image is None else image_size(image)
                filled.append((position, string, image, size))
            except ValueError as error:
                fail(position, error)
        measured = []
        all_ids = encode_batch(self.tokenizer, [string for _, string, _, _ in filled])
        for ids, (position, _, image, size) in zip(all_ids, filled, strict=True):
            try:
                measured.append(self._measure(position, ids, image, size))
            except ValueError as error:
                fail(position, error)
        return measured

    def _accept(self, item: Input) -> tuple[str | None, ImageSource | str | None]:
        text, image = split_input(item)
        if image is not None and "image" not in self.config.modalities:
            raise ValueError("this is a text-only model: it cannot embed images")
        if text is not None:
            check_text(text, self._forbidden)
        return text, image

    def _measure(
        self, position: int, ids: list[int], image: ImageSource | str | None, size: Size | None
    ) -> Measured:
        length, shape_key = len(ids), 0
        if size is not None:
            tokens, shape_key = self.measure_image(size)
            length += tokens - 1
        longest = self.config.text.max_position_embeddings
        if length > longest:
            raise ValueError(
                f"{length} tokens, the model takes at most {longest}: shorten the text"
            )
        return Measured(position, ids, length, shape_key, image, size)

    def measure_image(self, size: Size) -> tuple[int, int]:
        """(tokens, shape key) of an image of ``size`` (height, width) pixels.

        Raises:
            ValueError: the model embeds no images, or none of this size.
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
        return TextBatch(*pad_right(ids, shape.length, pad_id=0))


def load_text(item: Measured) -> list[int]:
    """The token ids of a text, which needs no more work."""
    return item.ids
