"""The architecture of a LLaVA-NeXT model, read from either layout of its configuration."""

import copy
import dataclasses
from dataclasses import dataclass
from typing import Any, Self

from e5v_jax.nn.config import TextConfig, UnsupportedModelError, VisionConfig, transformers_config

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

ORIGINAL_IMAGE_TOKEN = -200
"""The original code's placeholder, which is no row of any table and not in its tokenizers."""


@dataclass(frozen=True)
class LlavaNextConfig:
    """A CLIP tower, a projector and a decoder."""

    text: TextConfig
    vision: VisionConfig
    vision_feature_layer: int  # index into the tower's hidden_states
    image_token_id: int  # of the `<image>` placeholder; ORIGINAL_IMAGE_TOKEN asks the tokenizer
    image_grid_pinpoints: tuple[tuple[int, int], ...]  # (height, width) in pixels

    @property
    def modalities(self) -> tuple[str, ...]:
        """What the model embeds."""
        return ("text", "image")

    @property
    def num_vision_layers(self) -> int:
        """Vision blocks that feed the projector; those after the feature layer never run."""
        layers = self.vision.num_hidden_layers
        return self.vision_feature_layer + (layers + 1 if self.vision_feature_layer < 0 else 0)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """The inverse of ``dataclasses.asdict``; unknown or missing fields raise TypeError."""
        return cls(
            **{
                **data,
                "text": TextConfig(**data["text"]),
                "vision": VisionConfig(**data["vision"]),
                "image_grid_pinpoints": _pinpoints(data),
            }
        )

    @classmethod
    def from_hf(cls, raw: dict[str, Any]) -> Self:
        """Read a parsed ``config.json``, of transformers or of the original LLaVA code.

        Raises UnsupportedModelError: the architecture, or an option of it, is not computed here.
        """
        if raw["model_type"] == "llava_next":
            return cls._from_transformers(raw)
        if is_original(raw):
            return cls._from_original(raw)
        names = raw.get("architectures") or [raw["model_type"]]
        raise UnsupportedModelError(
            f"unsupported architecture {names[0]!r} (model_type {raw['model_type']!r}): expected "
            "LLaVA-NeXT or a Llama or Mistral text model"
        )

    @classmethod
    def _from_transformers(cls, raw: dict[str, Any]) -> Self:
        hf = transformers_config(raw, "llava_next")
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
            image_grid_pinpoints=_pinpoints({"image_grid_pinpoints": hf.image_grid_pinpoints}),
        )

    @classmethod
    def _from_original(cls, raw: dict[str, Any]) -> Self:
        """The original layout: a Llama or Mistral config with ``mm_*`` fields."""
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
        decoder = "mistral" if raw["model_type"] == "llava_mistral" else "llama"
        return cls(
            text=TextConfig.from_hf(transformers_config(raw, decoder)),
            vision=VisionConfig.from_hf(
                transformers_config(vision, vision.get("model_type", "clip_vision_model"))
            ),
            vision_feature_layer=raw["mm_vision_select_layer"],
            image_token_id=raw.get("image_token_id", ORIGINAL_IMAGE_TOKEN),
            image_grid_pinpoints=_pinpoints(raw),
        )


def is_original(raw: dict[str, Any]) -> bool:
    """Whether a ``config.json`` is of the original LLaVA code."""
    return "mm_vision_tower" in raw


def transformers_layout(raw: dict[str, Any], config: LlavaNextConfig) -> dict[str, Any]:
    """The ``config.json`` that transformers reads; of the original layout, a translation."""
    if not is_original(raw):
        return copy.deepcopy(raw)
    kept = ("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
    text = {
        **dataclasses.asdict(config.text),  # rope_theta among them, for transformers 4
        **{key: raw[key] for key in kept if key in raw},
        "hidden_act": "silu",
        "rope_parameters": {"rope_type": "default", "rope_theta": config.text.rope_theta},
    }
    if config.text.model_type == "mistral":
        text["sliding_window"] = None  # transformers' default is 4096
    return {
        "architectures": ["LlavaNextForConditionalGeneration"],
        "model_type": "llava_next",
        "dtype": "float32",
        "torch_dtype": "float32",
        "image_grid_pinpoints": [list(size) for size in config.image_grid_pinpoints],
        "image_seq_length": config.vision.num_patches,
        "image_token_index": config.image_token_id,
        "multimodal_projector_bias": True,
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": raw.get("tie_word_embeddings", False),
        "text_config": text,
        "vision_config": {**dataclasses.asdict(config.vision), "model_type": "clip_vision_model"},
        "vision_feature_layer": config.vision_feature_layer,
        "vision_feature_select_strategy": "default",
    }


def _pinpoints(data: dict[str, Any]) -> tuple[tuple[int, int], ...]:
    return tuple((int(h), int(w)) for h, w in data["image_grid_pinpoints"])
