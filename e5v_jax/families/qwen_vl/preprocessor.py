"""What the image processor's settings in a model folder must say: what is computed here."""

from typing import Any

from e5v_jax.families.qwen_vl.config import QwenVLConfig
from e5v_jax.families.qwen_vl.processor import pixel_limits
from e5v_jax.families.qwen_vl.vision import FRAMES
from e5v_jax.families.qwen_vl.vision_config import QWEN3
from e5v_jax.families.settings import check_settings
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
_SIZES = ("size", "min_pixels", "max_pixels")
_IGNORED_SETTINGS = {
    **dict.fromkeys(
        ("data_format", "input_data_format", "return_tensors", "device", "disable_grouping"),
        "how transformers holds its arrays",
    ),
    **dict.fromkeys(_SIZES, "the limits are the preset's or an option's: docs/models.md"),
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
    check_settings(settings, supported, _IGNORED_SETTINGS)
