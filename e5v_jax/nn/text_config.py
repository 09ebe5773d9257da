"""The architecture of a decoder, read from the configurations of Llama, Mistral and Qwen."""

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Self

from e5v_jax.nn.config import UnsupportedModelError, check_multiple, check_numbers, from_fields
from e5v_jax.nn.rope import RopeScaling


class _Architecture(NamedTuple):
    """What a ``model_type`` says of the computation that is no field of its configuration."""

    qkv_bias: bool = False
    qk_norm: bool = False
    mrope_section: tuple[int, ...] = ()  # where the file has none
    mrope_interleaved: bool = False


_ARCHITECTURES = {
    "llama": _Architecture(),
    "mistral": _Architecture(),
    "qwen2": _Architecture(qkv_bias=True),
    "qwen3": _Architecture(qk_norm=True),
    "qwen2_vl_text": _Architecture(qkv_bias=True, mrope_section=(16, 24, 24)),
    "qwen2_5_vl_text": _Architecture(qkv_bias=True, mrope_section=(16, 24, 24)),
    "qwen2_5_omni_text": _Architecture(qkv_bias=True, mrope_section=(16, 24, 24)),
    "qwen3_vl_text": _Architecture(
        qk_norm=True, mrope_section=(24, 20, 20), mrope_interleaved=True
    ),
}


@dataclass(frozen=True)
class TextConfig:
    """The architecture of a decoder: RMSNorm, rotary positions, grouped queries, SwiGLU."""

    vocab_size: int  # rows of the embedding table
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    model_type: str  # of the Hugging Face class; what it means for the computation stands below
    # Folders converted before these fields were there lack them; they hold models without.
    qkv_bias: bool = False
    qk_norm: bool = False  # RMSNorm of each head's query and key, before they are turned
    rope_scaling: RopeScaling | None = None
    mrope_section: tuple[int, ...] = ()  # frequencies for time, row, column; none: one position
    mrope_interleaved: bool = False
    sliding_window: int | None = None  # inputs up to its length do not feel it; longer are refused

    def __post_init__(self) -> None:
        """Check what every source of a configuration must hold. Raises ValueError: names it."""
        check_numbers(self)
        check_multiple(self, "num_attention_heads", "num_key_value_heads")
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}: rotary positions need an even one")
        _architecture(self.model_type)
        if self.rope_scaling and self.rope_scaling.rope_type == "yarn" and self.rope_theta == 1:
            raise ValueError("rope_theta is 1: 'yarn' needs a larger one")
        section, half = self.mrope_section, self.head_dim // 2
        sizes = isinstance(section, tuple) and all(type(n) is int and n >= 0 for n in section)
        if not sizes or (section and (len(section) != 3 or sum(section) != half)):
            found = list(section) if isinstance(section, tuple) else section
            raise ValueError(
                f"mrope_section is {found!r}: expected three sizes whose sum is half of head_dim, "
                f"{half}"
            )
        if self.mrope_interleaved and not section:
            raise ValueError("mrope_interleaved is true, but there is no mrope_section")

    @property
    def max_length(self) -> int:
        """The longest input, in tokens, on which the computation is the reference's."""
        # a query sees the `sliding_window` keys that end with its own
        return min(
            self.max_position_embeddings, self.sliding_window or self.max_position_embeddings
        )

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """The inverse of ``dataclasses.asdict``. Raises ValueError: names the field."""
        scaling = partial(from_fields, RopeScaling, name="model.text.rope_scaling")
        parts = {
            "rope_scaling": lambda value: None if value is None else scaling(value),
            "mrope_section": lambda value: tuple(value) if isinstance(value, list) else value,
        }
        return from_fields(cls, data, "model.text", parts)

    @classmethod
    def from_hf(cls, hf: Any) -> Self:
        """Read transformers' configuration of a decoder, of its version 4 or 5.

        Not read, because no embedding depends on them: dropouts, initialisation, caching, token
        ids, whether the head is tied, and Llama's ``pretraining_tp``, a split of the same products.
        Raises UnsupportedModelError: the architecture or one of its options is not computed here.
        """
        kind = _architecture(hf.model_type)  # before options that others have not
        refused = {
            "hidden_act": (hf.hidden_act, "silu"),
            "attention_bias": (getattr(hf, "attention_bias", kind.qkv_bias), kind.qkv_bias),
            "mlp_bias": (getattr(hf, "mlp_bias", False), False),
            "is_causal": (getattr(hf, "is_causal", True), True),
        }
        for key, (found, expected) in refused.items():
            if found != expected:
                raise UnsupportedModelError(f"{key} is {found!r}: only {expected!r} is supported")
        rope = dict(hf.rope_parameters or {})  # transformers folds an old top-level rope_theta in
        given: dict[str, Any] = {f.name: getattr(hf, f.name, None) for f in dataclasses.fields(cls)}
        width = hf.hidden_size // hf.num_attention_heads
        if given["head_dim"] is None:
            given["head_dim"] = width
        if hf.model_type in ("qwen2_vl_text", "qwen2_5_vl_text") and given["head_dim"] != width:
            raise UnsupportedModelError(
                f"head_dim is {given['head_dim']!r}: only hidden_size / num_attention_heads "
                f"({width}) is supported"
            )
        given |= kind._asdict()
        if kind.mrope_section:
            if rope.pop("mrope_interleaved", kind.mrope_interleaved) != kind.mrope_interleaved:
                raise UnsupportedModelError(
                    f"mrope_interleaved: only {kind.mrope_interleaved!r} is supported"
                )
            section = rope.pop("mrope_section", kind.mrope_section)
            given["mrope_section"] = tuple(section) if isinstance(section, list) else section
        given["rope_scaling"] = RopeScaling.from_hf(rope, hf.max_position_embeddings)
        given["sliding_window"] = _sliding_window(hf)
        theta = rope["rope_theta"]
        return cls(**{**given, "rope_theta": float(theta) if type(theta) is int else theta})


def _architecture(model_type: str) -> _Architecture:
    if model_type not in _ARCHITECTURES:
        raise UnsupportedModelError(
            f"unsupported architecture {model_type!r}: expected one of {', '.join(_ARCHITECTURES)}"
        )
    return _ARCHITECTURES[model_type]


def _sliding_window(hf: Any) -> int | None:
    """The window of the layers that have one; the classes of Qwen2 and Qwen3 choose them."""
    window: int | None = getattr(hf, "sliding_window", None)
    kinds: list[str] = getattr(hf, "layer_types", None) or []
    if hf.model_type in ("llama", "qwen3_vl_text") and window is not None:
        raise UnsupportedModelError(f"sliding_window is {window!r}: only None is supported")
    if hf.model_type == "mistral":
        return window  # of every layer
    for kind in kinds:
        if kind != "full_attention" and (kind != "sliding_attention" or window is None):
            raise UnsupportedModelError(
                f"layer_types has {kind!r}, sliding_window is {window!r}: this is not supported"
            )
    return window if "sliding_attention" in kinds else None
