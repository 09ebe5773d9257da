"""The architecture of the parts that families share, read from Hugging Face configurations."""

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import transformers

T = TypeVar("T")
LARGEST = 2**31 - 1
"""Of any number that counts something: what int32 holds."""
_LIMITS = {"num_hidden_layers": 1000, "rope_theta": 10**15}  # LARGEST for others, 1 for epsilons


class UnsupportedModelError(ValueError):
    """The checkpoint asks for something this model does not compute; the message names it."""


def from_fields(
    cls: type[T], data: Any, name: str, parts: Mapping[str, Callable[[Any], Any]] | None = None
) -> T:
    """The dataclass ``cls`` of an object in a file, where it is ``name``.

    ``parts`` makes of some values what their fields hold. Raises ValueError: no object, a field is
    missing or one too many, or as ``cls`` and ``parts`` themselves.
    """
    if not isinstance(data, dict):
        raise ValueError(f"{name} is {data!r}: expected an object")
    fields = {f.name: f.default is dataclasses.MISSING for f in dataclasses.fields(cls)}  # type: ignore[arg-type]  # any dataclass
    if missing := [field for field, required in fields.items() if required and field not in data]:
        raise ValueError(f"{name} has no {missing[0]!r}")
    if unknown := sorted(data.keys() - fields.keys()):
        raise ValueError(f"{name} has {unknown[0]!r}, which is not known")
    return cls(**{**data, **{field: make(data[field]) for field, make in (parts or {}).items()}})


def check_numbers(config: Any, section: str = "") -> None:
    """Check that each field of a configuration has its type, and each number its range.

    Counts are from 1, ``rope_theta`` is too, epsilons are from 0 to 1. Raises ValueError: names the
    field, in its ``section``.
    """
    for field in dataclasses.fields(config):
        value, kind = getattr(config, field.name), field.type
        if kind is str and not isinstance(value, str):
            raise ValueError(f"{section}{field.name} is {value!r}: expected a string")
        if kind not in (int, float):
            continue
        low, high = (0, 1) if field.name.endswith("eps") else (1, LARGEST)
        high = _LIMITS.get(field.name, high)
        # a bool is an int to Python, and NaN is in no range
        if type(value) not in (int, kind) or not low <= value <= high:
            what = "a whole number" if kind is int else "a number"
            raise ValueError(
                f"{section}{field.name} is {value!r}: expected {what} from {low} to {high}"
            )


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
    model_type: str  # "llama" or "mistral": the same computation, other Hugging Face classes

    def __post_init__(self) -> None:
        """Check what every source of a configuration must hold. Raises ValueError: names it."""
        check_numbers(self)
        _check_multiple(self, "num_attention_heads", "num_key_value_heads")
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}: rotary positions need an even one")
        _check_architecture(self.model_type)

    @classmethod
    def from_hf(cls, hf: Any) -> Self:
        """Read a ``LlamaConfig`` or ``MistralConfig``, of transformers 4 or 5.

        Raises UnsupportedModelError: the architecture or one of its options is not computed here.
        """
        _check_architecture(hf.model_type)  # before options that others have not
        rope = dict(hf.rope_parameters or {})  # transformers folds an old top-level rope_theta in
        if rope.get("rope_type", "default") != "default":
            raise UnsupportedModelError(
                f"rope_type {rope['rope_type']!r}: only unscaled rotary positions are supported"
            )
        refused = {
            "hidden_act": (hf.hidden_act, "silu"),
            "attention_bias": (getattr(hf, "attention_bias", False), False),
            "mlp_bias": (getattr(hf, "mlp_bias", False), False),
            "sliding_window": (getattr(hf, "sliding_window", None), None),
        }
        for key, (found, expected) in refused.items():
            if found != expected:
                raise UnsupportedModelError(f"{key} is {found!r}: only {expected!r} is supported")
        given: dict[str, Any] = {f.name: getattr(hf, f.name, None) for f in dataclasses.fields(cls)}
        if given["head_dim"] is None:
            given["head_dim"] = hf.hidden_size // hf.num_attention_heads
        theta = rope["rope_theta"]
        return cls(**{**given, "rope_theta": float(theta) if type(theta) is int else theta})


def _check_architecture(model_type: str) -> None:
    if model_type not in ("llama", "mistral"):
        raise UnsupportedModelError(
            f"unsupported architecture {model_type!r}: expected 'llama' or 'mistral'"
        )


def _check_multiple(config: Any, whole: str, part: str, section: str = "") -> None:
    if getattr(config, whole) % getattr(config, part):
        raise ValueError(
            f"{section}{whole} {getattr(config, whole)} is not a multiple of {part} "
            f"{getattr(config, part)}"
        )


def transformers_config(raw: dict[str, Any], model_type: str) -> Any:
    """The parsed ``config.json`` as transformers' own configuration of ``model_type``.

    Fields the file leaves out take the value of that class, which is what the file means:
    transformers writes only what differs.
    """
    fields = {k: v for k, v in raw.items() if k != "model_type"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of names that old files have
        return transformers.AutoConfig.for_model(model_type, **fields)
