"""The architecture of a Qwen-VL model: a tower for any resolution, mergers, a Qwen decoder."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from e5v_jax.families.qwen_vl.layouts import (
    TOKENS,
    check_copies,
    check_fields,
    read_layout,
    split_copies,
)
from e5v_jax.families.qwen_vl.vision_config import QwenVisionConfig
from e5v_jax.nn.config import LARGEST, from_fields, transformers_config
from e5v_jax.nn.text_config import TextConfig


@dataclass(frozen=True)
class QwenVLConfig:
    """A tower and a decoder."""

    text: TextConfig
    vision: QwenVisionConfig
    image_token_id: int  # of `<|image_pad|>`, which stands for a token of an image
    vision_start_token_id: int
    vision_end_token_id: int
    min_pixels: int | None = None  # of an image, as the model folder's image processor has it
    max_pixels: int | None = None

    def __post_init__(self) -> None:
        """Check what every source of a configuration must hold. Raises ValueError: names it."""
        for name in TOKENS:
            token = getattr(self, name)
            if type(token) is not int or not 0 <= token <= LARGEST:
                raise ValueError(f"{name} is {token!r}: expected the id of a token")
        if (self.min_pixels, self.max_pixels) != (None, None):
            check_limits({"min_pixels": self.min_pixels, "max_pixels": self.max_pixels})
        if self.vision.out_hidden_size != self.text.hidden_size:
            raise ValueError(
                f"vision_config.out_hidden_size is {self.vision.out_hidden_size}: expected "
                f"text_config.hidden_size, {self.text.hidden_size}"
            )
        deep = len(self.vision.deepstack_visual_indexes)
        if deep > self.text.num_hidden_layers:
            raise ValueError(
                f"vision_config.deepstack_visual_indexes has {deep} blocks for "
                f"{self.text.num_hidden_layers} layers of the decoder: expected no more than those"
            )

    @property
    def modalities(self) -> tuple[str, ...]:
        """What the model embeds."""
        return ("text", "image")

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """The inverse of ``dataclasses.asdict``. Raises ValueError: names the field."""
        parts: dict[str, Callable[[Any], Any]] = {
            "text": TextConfig.from_dict,
            "vision": QwenVisionConfig.from_dict,
        }
        return from_fields(cls, data, "model", parts)

    @classmethod
    def from_hf(cls, raw: dict[str, Any]) -> Self:
        """Read a parsed ``config.json``. Raises UnsupportedModelError: it is not computed here."""
        raw = read_layout(raw)
        check_fields(raw)
        raw, copies = split_copies(raw)
        hf = transformers_config(raw, raw["model_type"])
        tokens: dict[str, Any] = {name: getattr(hf, name, None) for name in TOKENS}
        text = TextConfig.from_hf(hf.text_config)
        check_copies(copies, raw, text)
        return cls(
            text=text,
            vision=QwenVisionConfig.from_hf(raw["vision_config"], hf.vision_config),
            **tokens,
        )


def check_limits(limits: Mapping[str, Any]) -> None:
    """Check the least and the most pixels of an image, by the names that a file has for them.

    Raises ValueError: names the one that is no count of pixels, or both.
    """
    for name, value in limits.items():
        if type(value) is not int or not 1 <= value <= LARGEST:
            raise ValueError(f"{name} is {value!r}: expected a number of pixels, 1 to {LARGEST}")
    (low, least), (high, most) = limits.items()
    if least > most:
        raise ValueError(f"{low} is {least}: expected at most {high}, {most}")
