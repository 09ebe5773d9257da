"""Architecture of one model: frozen dataclasses read from a Hugging Face configuration."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Self

import transformers

# Checkpoints of the original LLaVA code name the vision tower instead of describing it.
KNOWN_VISION_TOWERS: dict[str, dict[str, Any]] = {
    "openai/clip-vit-large-patch14-336": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
        "layer_norm_eps": 1e-5,
        "hidden_act": "quick_gelu",
    }
}


class UnsupportedModelError(ValueError):
    """The checkpoint asks for something this model does not compute; the message names it."""


@dataclass(frozen=True)
class VisionConfig:
    """CLIP vision transformer (reference.md section 1: ViT-L/14 at 336 px)."""

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
        """Read a ``CLIPVisionConfig``."""
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
    """Llama-family decoder: RMSNorm, rotary positions, grouped queries, SwiGLU, no biases."""

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
        """Read a ``LlamaConfig`` or ``MistralConfig``, of transformers 4 or 5."""
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
        return cls(
            vocab_size=hf.vocab_size,
            hidden_size=hf.hidden_size,
            intermediate_size=hf.intermediate_size,
            num_hidden_layers=hf.num_hidden_layers,
            num_attention_heads=hf.num_attention_heads,
            num_key_value_heads=hf.num_key_value_heads,
            head_dim=getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
            rms_norm_eps=hf.rms_norm_eps,
            rope_theta=float(rope["rope_theta"]),
            max_position_embeddings=hf.max_position_embeddings,
            model_type=hf.model_type,
        )


@dataclass(frozen=True)
class ModelConfig:
    """A text-only decoder (``vision`` is None) or a LLaVA-NeXT model."""

    text: TextConfig
    vision: VisionConfig | None = None
    vision_feature_layer: int = -2  # index into the tower's hidden_states
    image_token_id: int | None = None  # id of the `<image>` placeholder
    image_grid_pinpoints: tuple[tuple[int, int], ...] = ()  # (height, width) in pixels

    @property
    def num_vision_layers(self) -> int:
        """Vision blocks that feed the projector; those after the feature layer never run."""
        if self.vision is None:
            return 0
        layers = self.vision.num_hidden_layers
        return self.vision_feature_layer + (layers + 1 if self.vision_feature_layer < 0 else 0)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form, read back by :meth:`from_dict`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Inverse of :meth:`to_dict`; unknown or missing fields raise ``TypeError``."""
        vision = data["vision"]
        pinpoints = tuple((int(h), int(w)) for h, w in data["image_grid_pinpoints"])
        return cls(
            **{
                **data,
                "text": TextConfig(**data["text"]),
                "vision": None if vision is None else VisionConfig(**vision),
                "image_grid_pinpoints": pinpoints,
            }
        )

    @classmethod
    def from_hf(cls, raw: dict[str, Any]) -> Self:
        """Read a parsed ``config.json``.

        Fields the file leaves out take the value of transformers' own configuration class of that
        ``model_type``, which is what the file means: transformers writes only what differs.

        Raises:
            UnsupportedModelError: the architecture, or one of its options, is not computed here.
        """
        model_type = raw.get("model_type")
        if model_type == "llava_next":
            return cls._from_llava_next(raw)
        if model_type in ("llava_llama", "llava_mistral", "llava"):
            if "mm_vision_tower" in raw:
                return cls._from_llava_original(raw)
        elif model_type in ("llama", "mistral"):
            return cls(text=TextConfig.from_hf(_hf_config(raw)))
        names = raw.get("architectures") or [model_type]
        raise UnsupportedModelError(
            f"unsupported architecture {names[0]!r} (model_type {model_type!r}): expected "
            "LLaVA-NeXT or a Llama or Mistral text model"
        )

    @classmethod
    def _from_llava_next(cls, raw: dict[str, Any]) -> Self:
        hf: Any = _hf_config(raw)
        if hf.vision_feature_select_strategy != "default":
            raise UnsupportedModelError(
                f"vision_feature_select_strategy {hf.vision_feature_select_strategy!r}: "
                "only 'default' (class token dropped) is supported"
            )
        if not isinstance(hf.vision_feature_layer, int):
            raise UnsupportedModelError(
                f"vision_feature_layer {hf.vision_feature_layer!r}: expected one integer"
            )
        if hf.projector_hidden_act != "gelu" or not hf.multimodal_projector_bias:
            raise UnsupportedModelError("the projector must use gelu and biases")
        return cls(
            text=TextConfig.from_hf(hf.text_config),
            vision=VisionConfig.from_hf(hf.vision_config),
            vision_feature_layer=hf.vision_feature_layer,
            image_token_id=hf.image_token_id,
            image_grid_pinpoints=tuple((int(h), int(w)) for h, w in hf.image_grid_pinpoints),
        )

    @classmethod
    def _from_llava_original(cls, raw: dict[str, Any]) -> Self:
        """The original LLaVA-NeXT layout: a Llama or Mistral config with ``mm_*`` fields."""
        expected = {
            "mm_projector_type": "mlp2x_gelu",
            "mm_patch_merge_type": "spatial_unpad",
            "mm_vision_select_feature": "patch",
        }
        for key, value in expected.items():
            if raw.get(key, value) != value:
                raise UnsupportedModelError(f"{key} is {raw[key]!r}: only {value!r} is supported")
        tower = raw["mm_vision_tower"]
        vision = raw.get("vision_config") or KNOWN_VISION_TOWERS.get(tower)
        if vision is None:
            raise UnsupportedModelError(
                f"mm_vision_tower {tower!r} is not known; expected one of "
                f"{sorted(KNOWN_VISION_TOWERS)} or a vision_config in config.json"
            )
        for key in ("mm_vision_select_layer", "image_grid_pinpoints"):
            if key not in raw:
                raise UnsupportedModelError(f"config.json has no {key!r}")
        family = "mistral" if raw["model_type"] == "llava_mistral" else "llama"
        text = TextConfig.from_hf(_hf_config({**raw, "model_type": family}))
        names = {f.name for f in dataclasses.fields(VisionConfig)}
        return cls(
            text=text,
            vision=VisionConfig(**{k: v for k, v in vision.items() if k in names}),
            vision_feature_layer=raw["mm_vision_select_layer"],
            # the original's placeholder is -200, no row of any table: the first free id serves
            image_token_id=raw.get("image_token_id", text.vocab_size),
            image_grid_pinpoints=tuple((int(h), int(w)) for h, w in raw["image_grid_pinpoints"]),
        )


def _hf_config(raw: dict[str, Any]) -> Any:
    fields = {k: v for k, v in raw.items() if k != "model_type"}
    return transformers.AutoConfig.for_model(raw["model_type"], **fields)
