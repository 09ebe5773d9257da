"""What the image processor's settings in a model folder say, and what they must say."""

import dataclasses
from typing import Any

from e5v_jax.families.qwen_vl.config import QwenVLConfig, check_limits
from e5v_jax.families.qwen_vl.processor import pixel_limits
from e5v_jax.families.qwen_vl.vision import FRAMES
from e5v_jax.families.qwen_vl.vision_config import QWEN3
from e5v_jax.families.settings import check_settings
from e5v_jax.nn.config import UnsupportedModelError
from e5v_jax.presets import Preset

_KINDS = ("ImageProcessor", "ImageProcessorFast", "ImageProcessorPil", "Processor")
_CLASSES = (
    *(
        f"{name}{kind}"
        for name in ("Qwen2VL", "Qwen2_5_VL", "Qwen2_5Omni", "Qwen3VL")
        for kind in _KINDS
    ),
    None,
)
_TYPES = ("image_processor_type", "feature_extractor_type", "processor_class", "_processor_class")
_LIMITS = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}  # the latter in `size`
_IGNORED_SETTINGS = {
    **dict.fromkeys(
        ("data_format", "input_data_format", "return_tensors", "device", "disable_grouping"),
        "how transformers holds its arrays",
    ),
    **dict.fromkeys(("size", *_LIMITS), "followed, and compared as the limits that they mean"),
    "default_to_square": "the size is an area in any case",
    "auto_map": "code that is never run",
    "chat_template": "prompts are those of presets.py",
    "video_processor": "there are no videos",
    "do_convert_rgb": "every image is made RGB, as the preset says",
}
# What a file means that leaves them out: the defaults of transformers' class.
_DEFAULTS = {
    "patch_size": 14,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
_DEFAULT_SIZE = {"shortest_edge": 56**2, "longest_edge": 1280 * 28**2}


def match_preprocessor(config: QwenVLConfig, settings: dict[str, Any]) -> QwenVLConfig:
    """``config`` with an image processor's least and most pixels of an image.

    Raises ValueError, naming the one that is no count of pixels.
    """
    least, most = _limits(settings)
    return dataclasses.replace(config, min_pixels=least, max_pixels=most)


def _limits(settings: dict[str, Any]) -> tuple[int, int]:
    """As transformers reads them: min_pixels and max_pixels go before ``size``, if both are there.

    Raises ValueError: as :func:`match_preprocessor`.
    """
    size = settings.get("size")
    size = _DEFAULT_SIZE if size is None else size
    if not isinstance(size, dict):
        raise ValueError(f"size is {size!r}: expected an object, of {' and '.join(_DEFAULT_SIZE)}")
    found: dict[str, Any] = {}
    for name, edge in _LIMITS.items():
        own = settings.get(name)
        found[f"size.{edge}" if own is None else name] = size.get(edge) if own is None else own
    check_limits(found)
    least, most = found.values()
    return least, most


def hf_processor(config: QwenVLConfig, preset: Preset) -> dict[str, Any]:
    """See :attr:`e5v_jax.families.base.Family.hf_processor`."""
    vision, is_new = config.vision, config.vision.model_type == QWEN3
    least, most = pixel_limits(config, preset)
    return {
        "processor_class": "Qwen3VLProcessor" if is_new else "Qwen2_5_VLProcessor",
        "video_processor": {  # the processor cannot be loaded without one
            "video_processor_type": "Qwen3VLVideoProcessor" if is_new else "Qwen2VLVideoProcessor"
        },
        "image_processor": {
            "image_processor_type": "Qwen2VLImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"shortest_edge": least, "longest_edge": most},
            "resample": 3,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(vision.kind.mean),
            "image_std": list(vision.kind.std),
            "patch_size": vision.patch_size,
            "temporal_patch_size": FRAMES,
            "merge_size": vision.spatial_merge_size,
        },
    }


def check_preprocessor(config: QwenVLConfig, settings: dict[str, Any]) -> None:
    """Raise UnsupportedModelError, naming it, on a setting other than what is computed here."""
    vision = config.vision
    supported: dict[str, tuple[Any, ...]] = {
        "do_resize": (True,),
        "resample": (3, None),  # bicubic
        "do_rescale": (True,),
        "rescale_factor": (1 / 255,),
        "do_normalize": (True,),
        "image_mean": (list(vision.kind.mean),),
        "image_std": (list(vision.kind.std),),
        "patch_size": (vision.patch_size,),
        "temporal_patch_size": (FRAMES,),
        "merge_size": (vision.spatial_merge_size,),
        "do_pad": (False, None),
        "do_center_crop": (False, None),
        "crop_size": (None,),
        "pad_size": (None,),
        **dict.fromkeys(_TYPES, _CLASSES),
    }
    if "image_processor_type" in settings:  # not those of the processor around it
        settings = {**_DEFAULTS, **settings}
        try:
            found = _limits(settings)
        except ValueError as error:
            raise UnsupportedModelError(str(error)) from error
        followed = (config.min_pixels, config.max_pixels)
        if found != followed:
            others = "none" if None in followed else "{} to {}".format(*followed)
            raise UnsupportedModelError(
                f"size, min_pixels and max_pixels say {found[0]} to {found[1]} pixels, where the "
                f"folder's other file or its conversion has {others}: make them agree and run "
                "e5v-convert again"
            )
    check_settings(settings, supported, _IGNORED_SETTINGS)
