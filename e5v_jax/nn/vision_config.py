"""The architecture of a vision tower, read from transformers' configurations of the three kinds."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Self

from e5v_jax.nn.config import UnsupportedModelError, check_numbers, from_fields

CLIP, SIGLIP, DINOV2 = "clip_vision_model", "siglip_vision_model", "dinov2"
"""The kinds, as transformers calls them."""
# What CLIP was trained with: pixels = (tile / 255 - IMAGE_MEAN) / IMAGE_STD, in float32.
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
_ACTIVATIONS = ("quick_gelu", "gelu", "gelu_pytorch_tanh")


@dataclass(frozen=True)
class VisionConfig:
    """The architecture of a vision transformer; a folder without the last five fields has CLIP."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int  # pixels, square tiles
    patch_size: int  # pixels
    layer_norm_eps: float
    hidden_act: str  # "quick_gelu", "gelu" or "gelu_pytorch_tanh"; SwiGLU has its own
    model_type: str = CLIP
    qkv_bias: bool = True
    use_swiglu_ffn: bool = False
    image_mean: tuple[float, ...] = IMAGE_MEAN  # three, of the image processor
    image_std: tuple[float, ...] = IMAGE_STD

    def __post_init__(self) -> None:
        """Check what every source of a configuration must hold. Raises ValueError: names it."""
        _check_kind(self.model_type)
        check_numbers(self, "vision_config.")
        wholes = [("hidden_size", "num_attention_heads")]
        if self.model_type == CLIP:  # others leave out what is too little for a patch
            wholes.append(("image_size", "patch_size"))
        for whole, part in wholes:
            if getattr(self, whole) % getattr(self, part):
                raise ValueError(
                    f"vision_config.{whole} {getattr(self, whole)} is not a multiple of {part} "
                    f"{getattr(self, part)}"
                )
        if self.image_size < self.patch_size:
            raise ValueError(
                f"vision_config.image_size is {self.image_size}: less than patch_size "
                f"{self.patch_size}"
            )
        if self.hidden_act not in _ACTIVATIONS:
            raise UnsupportedModelError(
                f"vision_config.hidden_act {self.hidden_act!r}: expected {_or(_ACTIVATIONS)}"
            )
        for name in ("qkv_bias", "use_swiglu_ffn"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(
                    f"vision_config.{name} is {getattr(self, name)!r}: expected a bool"
                )
        for name, low in (("image_mean", -math.inf), ("image_std", 0)):
            value = getattr(self, name)
            if (
                not isinstance(value, tuple)
                or len(value) != 3
                or not all(type(x) in (int, float) and low < x < math.inf for x in value)
            ):
                shown = list(value) if isinstance(value, tuple) else value
                what = "numbers" if name == "image_mean" else "numbers above 0"
                raise ValueError(f"{name} is {shown!r}: expected three {what}")

    @property
    def has_class_token(self) -> bool:
        """Whether a token stands before the patches, which features leave out."""
        return self.model_type != SIGLIP

    @property
    def patches_per_side(self) -> int:
        """Patches along one side of a tile; pixels too few for one more are left out."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """Patches of one tile, without the class token."""
        return self.patches_per_side**2

    @property
    def num_positions(self) -> int:
        """Positions of one tile, with the class token."""
        return self.num_patches + self.has_class_token

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """The inverse of ``dataclasses.asdict``. Raises ValueError: names the field."""
        if isinstance(data, dict):
            data = {key: tuple(x) if isinstance(x, list) else x for key, x in data.items()}
        return from_fields(cls, data, "model.vision")

    @classmethod
    def from_hf(cls, hf: Any) -> Self:
        """Read a ``CLIPVisionConfig``, ``SiglipVisionConfig`` or ``Dinov2Config``.

        What is not read makes no difference to features: dropout and drop path (training alone has
        them), initial values (``initializer_range``, ``layerscale_value``), the head that
        ``vision_use_head`` asks for and the token that ``use_mask_token`` asks for (no feature
        comes through them), and what only DINOv2's backbone class has (``out_features``,
        ``out_indices``, ``apply_layernorm``, ``reshape_hidden_states``). Raises
        UnsupportedModelError: another kind of tower, or an option that is not computed here.
        """
        _check_kind(hf.model_type)
        for key, value in (("num_channels", 3), ("tie_last_hidden_states", False)):
            if (found := getattr(hf, key, None)) not in (value, None):
                raise UnsupportedModelError(
                    f"vision_config.{key} is {found!r}: only {value!r} is supported"
                )
        if hf.model_type != DINOV2:
            return cls(**{name: getattr(hf, name) for name in _COMMON}, model_type=hf.model_type)
        if getattr(hf, "head_dim", None) is not None:
            raise UnsupportedModelError(f"vision_config.head_dim is {hf.head_dim!r}: not supported")
        width = int(hf.hidden_size * hf.mlp_ratio)
        if hf.use_swiglu_ffn:  # which has three maps for two
            width = (int(width * 2 / 3) + 7) // 8 * 8
        numbers = {name: getattr(hf, name) for name in _COMMON if name != "intermediate_size"}
        return cls(
            **numbers,
            intermediate_size=width,
            model_type=DINOV2,
            qkv_bias=hf.qkv_bias,
            use_swiglu_ffn=hf.use_swiglu_ffn,
        )

    def to_clip(self) -> dict[str, Any]:
        """The fields of a ``CLIPVisionConfig``, of a tower of that kind."""
        return {name: getattr(self, name) for name in _COMMON}


_COMMON = tuple(field.name for field in dataclasses.fields(VisionConfig))[:8]


def _check_kind(model_type: Any) -> None:
    kinds = (CLIP, SIGLIP, DINOV2)
    if model_type not in kinds:
        raise UnsupportedModelError(
            f"vision_config.model_type {model_type!r}: expected {_or(kinds)}"
        )


def _or(names: tuple[str, ...]) -> str:
    *others, last = map(repr, names)
    return f"{', '.join(others)} or {last}"
