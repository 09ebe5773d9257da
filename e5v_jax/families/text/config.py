"""The architecture of a model that is a decoder alone."""

from dataclasses import dataclass
from typing import Any, Self

from e5v_jax.nn.config import from_fields, transformers_config
from e5v_jax.nn.text_config import TextConfig


@dataclass(frozen=True)
class TextModelConfig:
    """A decoder alone."""

    text: TextConfig

    @property
    def modalities(self) -> tuple[str, ...]:
        """What the model embeds."""
        return ("text",)

    @property
    def image_token_id(self) -> None:
        """There are no images."""
        return None

    @classmethod
    def from_hf(cls, raw: dict[str, Any]) -> Self:
        """Read a parsed ``config.json``. Raises UnsupportedModelError: it is not computed here."""
        return cls(TextConfig.from_hf(transformers_config(raw, raw["model_type"])))

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """The inverse of ``dataclasses.asdict``. Raises ValueError: names the field."""
        return from_fields(cls, data, "model", {"text": TextConfig.from_dict})
