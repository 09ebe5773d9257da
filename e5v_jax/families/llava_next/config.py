"""The architecture of a LLaVA-NeXT model, read from either layout of its configuration."""

import copy
import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

from e5v_jax.families.llava_next.original import check_original
from e5v_jax.families.llava_next.shrinking import can_shrink
from e5v_jax.nn.config import (
    LARGEST,
    UnsupportedModelError,
    from_fields,
    transformers_config,
)
from e5v_jax.nn.text_config import TextConfig
from e5v_jax.nn.vision_config import CLIP, VisionConfig

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

ONEVISION = "llava_onevision"
"""The ``model_type`` of LLaVA-NeXT whose feature maps are limited, and its tower SigLIP."""
ORIGINAL_IMAGE_TOKEN = -200
"""The original code's placeholder, which is no row of any table and not in its tokenizers."""


@dataclass(frozen=True)
class LlavaNextConfig:
    """A vision tower, a projector and a decoder."""

    text: TextConfig
    vision: VisionConfig
    # indices into the tower's hidden_states; features of several stand side by side
    vision_feature_layer: int | tuple[int, ...]
    image_token_id: int  # of the `<image>` placeholder; ORIGINAL_IMAGE_TOKEN asks the tokenizer
    image_grid_pinpoints: tuple[tuple[int, int], ...]  # (height, width) in pixels
    # LLaVA-OneVision's: a larger feature map is made about as many tiles large
    max_tiles: int | None = None
    # side of the square of a tile's patches whose mean is one token; transformers has no such model
    spatial_pool_stride: int = 1

    def __post_init__(self) -> None:
        """Check what every source of a configuration must hold. Raises ValueError: names it."""
        layers, layer = self.vision.num_hidden_layers, self.vision_feature_layer
        several = layer if isinstance(layer, tuple) else (layer,)
        if not several or not all(type(x) is int and 0 < abs(x) <= layers for x in several):
            shown = list(layer) if isinstance(layer, tuple) else layer
            raise ValueError(
                f"vision_feature_layer is {shown!r}: expected 1 to {layers}, or {-layers} to -1"
            )
        token = self.image_token_id
        if type(token) is not int or not (0 <= token <= LARGEST or token == ORIGINAL_IMAGE_TOKEN):
            raise ValueError(f"image_token_id is {token!r}: expected the id of a token")
        if (most := self.max_tiles) is not None and (
            type(most) is not int or not 0 < most <= LARGEST
        ):
            raise ValueError(f"max_tiles is {most!r}: expected a whole number from 1, or null")
        stride, side = self.spatial_pool_stride, self.vision.patches_per_side
        if type(stride) is not int or stride < 1 or side % stride:
            raise ValueError(
                f"spatial_pool_stride is {stride!r}: expected a divisor of {side}, the patches in "
                "a row of a tile"
            )
        size, pinpoints = self.vision.image_size, self.image_grid_pinpoints
        sides = [side for pinpoint in pinpoints for side in pinpoint]
        if not sides or any(
            type(side) is not int or not 0 < side <= LARGEST or side % size for side in sides
        ):
            raise ValueError(
                f"image_grid_pinpoints is {[list(x) for x in pinpoints]}: expected at least one "
                f"[height, width], multiples of the tower's image_size {size}"
            )

    @property
    def modalities(self) -> tuple[str, ...]:
        """What the model embeds."""
        return ("text", "image")

    @property
    def feature_depths(self) -> tuple[int, ...]:
        """The vision blocks whose outputs the projector gets, numbered from 1."""
        layer, layers = self.vision_feature_layer, self.vision.num_hidden_layers
        several = layer if isinstance(layer, tuple) else (layer,)
        return tuple(x + layers + 1 if x < 0 else x for x in several)

    @property
    def tile_side(self) -> int:
        """Tokens in a row of a tile."""
        return self.vision.patches_per_side // self.spatial_pool_stride

    @property
    def tile_tokens(self) -> int:
        """Tokens of a tile."""
        return self.tile_side**2

    @property
    def num_vision_layers(self) -> int:
        """Vision blocks that feed the projector; those after the last feature layer never run."""
        return max(self.feature_depths)

    def can_shrink(self, tiles: int) -> bool:
        """Whether some image of so many tiles, the whole image's counted, has too large a map."""
        return self.max_tiles is not None and can_shrink(tiles - 1, self.max_tiles)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """The inverse of ``dataclasses.asdict``. Raises ValueError: names the field."""
        parts: dict[str, Callable[[Any], Any]] = {
            "text": TextConfig.from_dict,
            "vision": VisionConfig.from_dict,
            "vision_feature_layer": _feature_layer,
            "image_grid_pinpoints": _pinpoints,
        }
        return from_fields(cls, data, "model", parts)

    @classmethod
    def from_hf(cls, raw: dict[str, Any]) -> Self:
        """Read a parsed ``config.json``, of transformers or of the original LLaVA code.

        Raises UnsupportedModelError: the architecture, or an option of it, is not computed here.
        """
        if raw["model_type"] in ("llava_next", ONEVISION):
            return cls._from_transformers(raw)
        if is_original(raw):
            return cls._from_original(raw)
        raise UnsupportedModelError(
            f"model_type is {raw['model_type']!r}, but it has neither LLaVA-NeXT's layout nor the "
            "mm_vision_tower of the original LLaVA code"
        )

    @classmethod
    def _from_transformers(cls, raw: dict[str, Any]) -> Self:
        """``video_token_index`` is not read: there are no inputs with videos."""
        kind = raw["model_type"]
        hf = transformers_config(raw, kind)
        vision = VisionConfig.from_hf(hf.vision_config)
        if (found := hf.vision_feature_select_strategy) != (expected := select_strategy(vision)):
            what = "is dropped" if vision.has_class_token else "does not exist"
            raise UnsupportedModelError(
                f"vision_feature_select_strategy {found!r}: only {expected!r} fits a tower "
                f"{vision.model_type!r}, whose class token {what}"
            )
        for key, value in (("projector_hidden_act", "gelu"), ("multimodal_projector_bias", True)):
            if getattr(hf, key) != value:
                raise UnsupportedModelError(
                    f"{key} is {getattr(hf, key)!r}: only {value!r} is supported"
                )
        return cls(
            text=TextConfig.from_hf(hf.text_config),
            vision=vision,
            vision_feature_layer=_feature_layer(hf.vision_feature_layer),
            image_token_id=hf.image_token_id,
            image_grid_pinpoints=_pinpoints(hf.image_grid_pinpoints),
            max_tiles=_max_tiles(hf.vision_aspect_ratio) if kind == ONEVISION else None,
        )

    @classmethod
    def _from_original(cls, raw: dict[str, Any]) -> Self:
        """The original layout: a Llama or Mistral config with ``mm_*`` fields."""
        check_original(raw)
        tower = raw["mm_vision_tower"]
        vision = KNOWN_VISION_TOWERS.get(str(tower)) or raw.get("vision_config")
        if vision is None:
            raise UnsupportedModelError(
                f"mm_vision_tower {tower!r} is not known; expected one of "
                f"{sorted(KNOWN_VISION_TOWERS)} or a vision_config in config.json"
            )
        kind = vision.get("model_type", CLIP)
        if kind != CLIP:  # the original code has ways of its own with each other tower
            raise UnsupportedModelError(
                f"vision_config.model_type {kind!r}: beside mm_vision_tower only {CLIP!r} is "
                "supported"
            )
        hf_vision = transformers_config(vision, kind)
        if raw["mm_hidden_size"] != (width := hf_vision.hidden_size):
            raise UnsupportedModelError(
                f"mm_hidden_size is {raw['mm_hidden_size']!r}: the tower's vectors have {width}"
            )
        decoder = "mistral" if raw["model_type"] == "llava_mistral" else "llama"
        return cls(
            text=TextConfig.from_hf(transformers_config(raw, decoder)),
            vision=VisionConfig.from_hf(hf_vision),
            vision_feature_layer=raw["mm_vision_select_layer"],
            image_token_id=raw.get("image_token_id", ORIGINAL_IMAGE_TOKEN),
            image_grid_pinpoints=_pinpoints(raw["image_grid_pinpoints"]),
        )


def is_original(raw: dict[str, Any]) -> bool:
    """Whether a ``config.json`` is of the original LLaVA code."""
    return "mm_vision_tower" in raw


def transformers_layout(raw: dict[str, Any], config: LlavaNextConfig) -> dict[str, Any]:
    """The ``config.json`` that transformers reads; of the original layout, a translation.

    Raises UnsupportedModelError: transformers has no such model.
    """
    if config.spatial_pool_stride != 1:
        raise UnsupportedModelError(
            f"spatial_pool_stride is {config.spatial_pool_stride}: transformers' LLaVA-NeXT does "
            "not pool the patches of a tile, so nothing that it loads has these vectors of images"
        )
    if not is_original(raw):
        return copy.deepcopy(raw)
    kept = ("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "rope_scaling")
    decoder = transformers_config(raw, config.text.model_type)
    ours = ("qkv_bias", "qk_norm", "rope_scaling", "mrope_section", "mrope_interleaved")
    text = {
        # rope_theta and rope_scaling too, for transformers 4
        **{key: x for key, x in dataclasses.asdict(config.text).items() if key not in ours},
        **{key: raw[key] for key in kept if key in raw},
        "hidden_act": "silu",
        "rope_parameters": decoder.rope_parameters,
    }
    if config.text.model_type != "mistral":
        del text["sliding_window"]  # which is null here, and 4096 where Mistral's file has none
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
        "vision_config": {**config.vision.to_clip(), "model_type": CLIP},
        "vision_feature_layer": config.vision_feature_layer,
        "vision_feature_select_strategy": "default",
    }


def select_strategy(vision: VisionConfig) -> str:
    """The ``vision_feature_select_strategy`` under which features are the patches, all of them.

    Under the other one transformers fails: "default" drops the first of what the tower returns,
    "full" does not, and what is left must fill the square of a tile.
    """
    return "default" if vision.has_class_token else "full"


def _max_tiles(value: str) -> int:
    """The number in a ``vision_aspect_ratio``. Raises UnsupportedModelError: it is of no kind."""
    if not (found := re.fullmatch("anyres_max_([1-9][0-9]*)", value)):
        raise UnsupportedModelError(
            f"vision_aspect_ratio is {value!r}: only 'anyres_max_' and a number of tiles, such as "
            "'anyres_max_9', is supported"
        )
    return int(found[1])


def _feature_layer(value: Any) -> Any:
    """The layers of a file's list, or its one; which they are is checked with the configuration."""
    return tuple(value) if isinstance(value, list) else value


def _pinpoints(value: Any) -> tuple[tuple[int, int], ...]:
    """The pairs of a file's list; what they hold is checked with the configuration."""
    if not isinstance(value, list | tuple) or any(
        not isinstance(pair, list | tuple) or len(pair) != 2 for pair in value
    ):
        raise ValueError(f"image_grid_pinpoints is {value!r}: expected a list of [height, width]")
    return tuple((height, width) for height, width in value)
