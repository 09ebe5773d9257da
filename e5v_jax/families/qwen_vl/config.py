"""The architecture of a Qwen-VL model: a tower for any resolution, mergers, a Qwen decoder."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from e5v_jax.nn.config import (
    LARGEST,
    UnsupportedModelError,
    check_multiple,
    check_numbers,
    from_fields,
    transformers_config,
)
from e5v_jax.nn.text_config import TextConfig

_SAVED_WITH = {
    "model_type": "it chose this family",
    "transformers_version": "who wrote the file",
    "architectures": "the class, which model_type says too",
    "dtype": "chosen when the model is loaded",
    "torch_dtype": "the same, of transformers 4",
    "initializer_range": "nothing is initialised",
    "auto_map": "code that is never run",
    "_name_or_path": "where the file came from",
    "attn_implementation": "how transformers computes the same",
    "_attn_implementation_autoset": "how transformers computes the same",
}
_NOT_NEEDED = {
    **_SAVED_WITH,
    "video_token_id": "there are no videos",
    "tie_word_embeddings": "there is no head",
    "use_cache": "nothing is generated",
    "bos_token_id": "prompts are those of presets.py",
    "eos_token_id": "prompts are those of presets.py",
    "pad_token_id": "no token ever sees padding",
}
"""Fields that no embedding depends on, and why; any other must be known."""
_TOKENS = ("image_token_id", "vision_start_token_id", "vision_end_token_id")


@dataclass(frozen=True)
class QwenVisionConfig:
    """The architecture of a tower (transformers' ``Qwen3VLVisionConfig``)."""

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    patch_size: int  # pixels
    spatial_merge_size: int  # patches of a side of a block that is one token
    out_hidden_size: int
    num_position_embeddings: int  # a square table of learned positions
    rope_theta: float
    hidden_act: str
    deepstack_visual_indexes: tuple[int, ...]  # blocks whose output goes to the decoder's layers

    def __post_init__(self) -> None:
        """Check what every source of a configuration must hold. Raises ValueError: names it."""
        section = "vision_config."
        check_numbers(self, section)
        check_multiple(self, "hidden_size", "num_heads", section)
        if (self.hidden_size // self.num_heads) % 4:
            raise ValueError(
                f"{section}hidden_size {self.hidden_size} over num_heads {self.num_heads}: expected"
                " a multiple of 4, for a row and a column turn half of each head each"
            )
        if self.hidden_act != "gelu_pytorch_tanh":
            raise UnsupportedModelError(
                f"{section}hidden_act {self.hidden_act!r}: only 'gelu_pytorch_tanh' is supported"
            )
        if self.position_side**2 != self.num_position_embeddings:
            raise ValueError(
                f"{section}num_position_embeddings is {self.num_position_embeddings}: expected a "
                "square number"
            )
        blocks = self.deepstack_visual_indexes
        right = isinstance(blocks, tuple) and all(type(i) is int for i in blocks)
        if not right or list(blocks) != sorted({i for i in blocks if 0 <= i < self.depth}):
            found = list(blocks) if isinstance(blocks, tuple) else blocks
            raise ValueError(
                f"{section}deepstack_visual_indexes is {found!r}: expected blocks from 0 to "
                f"{self.depth - 1}, each once, in order"
            )

    @property
    def position_side(self) -> int:
        """Rows, and columns, of the table of positions."""
        return int(self.num_position_embeddings**0.5)

    @property
    def factor(self) -> int:
        """Pixels of a side of what becomes one token."""
        return self.patch_size * self.spatial_merge_size

    @property
    def merged(self) -> int:
        """Patches that become one token."""
        return self.spatial_merge_size**2

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any], hf: Any) -> Self:
        """Read ``vision_config`` and transformers' own reading of it.

        Raises UnsupportedModelError: a field that is not computed here, or not known.
        """
        fields = {f: getattr(hf, f) for f in cls.__dataclass_fields__ if f != "rope_theta"}
        fixed = {"in_channels": 3, "temporal_patch_size": 2}
        known = (*fields, *fixed, "rope_parameters", *_SAVED_WITH)
        _check_known(raw, known, "vision_config.")
        for name, value in fixed.items():
            if getattr(hf, name) != value:
                raise UnsupportedModelError(
                    f"vision_config.{name} is {getattr(hf, name)!r}: only {value} is supported"
                )
        rope = hf.rope_parameters
        if set(rope) - {"rope_type", "rope_theta"} or rope["rope_type"] != "axial":
            raise UnsupportedModelError(
                f"vision_config.rope_parameters is {rope!r}: only rope_type 'axial' is supported"
            )
        blocks = fields["deepstack_visual_indexes"]
        fields["deepstack_visual_indexes"] = tuple(blocks) if isinstance(blocks, list) else blocks
        return cls(**fields, rope_theta=float(rope["rope_theta"]))

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """The inverse of ``dataclasses.asdict``. Raises ValueError: names the field."""
        parts = {"deepstack_visual_indexes": lambda x: tuple(x) if isinstance(x, list) else x}
        return from_fields(cls, data, "model.vision", parts)


@dataclass(frozen=True)
class QwenVLConfig:
    """A tower and a decoder."""

    text: TextConfig
    vision: QwenVisionConfig
    image_token_id: int  # of `<|image_pad|>`, which stands for a token of an image
    vision_start_token_id: int
    vision_end_token_id: int

    def __post_init__(self) -> None:
        """Check what every source of a configuration must hold. Raises ValueError: names it."""
        for name in _TOKENS:
            token = getattr(self, name)
            if type(token) is not int or not 0 <= token <= LARGEST:
                raise ValueError(f"{name} is {token!r}: expected the id of a token")
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
        _check_known(raw, (*_TOKENS, "text_config", "vision_config", *_NOT_NEEDED))
        for name in ("text_config", "vision_config"):
            if not isinstance(raw.get(name), dict):
                raise ValueError(f"{name} is {raw.get(name)!r}: expected an object")
        hf = transformers_config(raw, raw["model_type"])
        return cls(
            text=TextConfig.from_hf(hf.text_config),
            vision=QwenVisionConfig.from_hf(raw["vision_config"], hf.vision_config),
            **{name: getattr(hf, name) for name in _TOKENS},
        )


def _check_known(raw: Mapping[str, Any], known: tuple[str, ...], section: str = "") -> None:
    for name in raw:
        if name not in known:
            raise UnsupportedModelError(
                f"{section}{name} is {raw[name]!r}: this field is not known, and may matter"
            )
