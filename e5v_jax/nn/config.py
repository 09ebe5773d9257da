"""The architecture of the parts that families share, read from Hugging Face configurations."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Self

import transformers


class UnsupportedModelError(ValueError):
    """The checkpoint asks for something this model does not compute; the message names it."""


@dataclass(frozen=True)
class VisionConfig:
    """The architecture of a CLIP vision transformer (transformers' ``CLIPVisionConfig``)."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int  # pixels, square tiles
    patch_size: int  # pixels
    layer_norm_eps: float
    hidden_act: str  # "quick_gelu" or "gelu"

    @property
    def num_patches(self) -> int:
        """Patches of one tile, without the class token."""
        return (self.image_size // self.patch_size) ** 2

    @classmethod
    def from_hf(cls, hf: Any) -> Self:
        """Read a ``CLIPVisionConfig``. Raises UnsupportedModelError: other tower or activation."""
        if hf.model_type != "clip_vision_model":
            raise UnsupportedModelError(
                f"vision_config.model_type {hf.model_type!r}: only 'clip_vision_model' is supported"
            )
        if hf.hidden_act not in ("quick_gelu", "gelu"):
            raise UnsupportedModelError(
                f"vision_config.hidden_act {hf.hidden_act!r}: expected 'quick_gelu' or 'gelu'"
            )
        return cls(**{f.name: getattr(hf, f.name) for f in dataclasses.fields(cls)})


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

    @classmethod
    def from_hf(cls, hf: Any) -> Self:
        """Read a ``LlamaConfig`` or ``MistralConfig``, of transformers 4 or 5.

        Raises UnsupportedModelError: the architecture or one of its options is not computed here.
        """
        if hf.model_type not in ("llama", "mistral"):
            raise UnsupportedModelError(
                f"unsupported architecture {hf.model_type!r}: expected 'llama' or 'mistral'"
            )
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
        if hf.num_attention_heads % hf.num_key_value_heads:
            raise UnsupportedModelError(
                f"num_attention_heads {hf.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {hf.num_key_value_heads}"
            )
        given: dict[str, Any] = {f.name: getattr(hf, f.name, None) for f in dataclasses.fields(cls)}
        given["head_dim"] = given["head_dim"] or hf.hidden_size // hf.num_attention_heads
        return cls(**{**given, "rope_theta": float(rope["rope_theta"])})


def transformers_config(raw: dict[str, Any], model_type: str) -> Any:
    """The parsed ``config.json`` as transformers' own configuration of ``model_type``.

    Fields the file leaves out take the value of that class, which is what the file means:
    transformers writes only what differs.
    """
    fields = {k: v for k, v in raw.items() if k != "model_type"}
    return transformers.AutoConfig.for_model(model_type, **fields)
