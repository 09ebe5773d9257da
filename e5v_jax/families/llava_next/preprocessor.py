"""What the image processor's settings in a model folder say, and what they must say."""

import dataclasses
from typing import Any

from e5v_jax.families.llava_next.config import LlavaNextConfig, select_strategy
from e5v_jax.families.settings import check_settings
from e5v_jax.nn.vision_config import CLIP, IMAGE_MEAN, IMAGE_STD
from e5v_jax.presets import Preset
from e5v_jax.prompts import IMAGE_PLACEHOLDER

# transformers' names for what is computed here; the original LLaVA code keeps CLIP's
_KINDS = ("ImageProcessor", "ImageProcessorFast", "ImageProcessorPil", "FeatureExtractor")
_NAMES, _ONEVISION_NAMES = ("LlavaNext", "CLIP"), ("LlavaOnevision",)
_TYPES = ("image_processor_type", "feature_extractor_type")
_IGNORED_SETTINGS = {
    **dict.fromkeys(
        ("data_format", "input_data_format", "return_tensors", "device", "disable_grouping"),
        "how transformers holds its arrays",
    ),
    "auto_map": "code that is never run",
    "do_pad": "a batch's images are padded to the most tiles in any case",
    "default_to_square": "the size is square in any case",
    "chat_template": "prompts are those of prompts.py",
    **dict.fromkeys(("video_token", "video_processor"), "of videos, which no input has"),
}
# What a file means that leaves them out: the defaults of transformers' classes.
_DEFAULTS = {
    "size": 224,
    "crop_size": 224,
    "image_mean": list(IMAGE_MEAN),
    "image_std": list(IMAGE_STD),
}
_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
_ONEVISION_DEFAULTS = {
    "size": {"height": 384, "width": 384},
    "image_mean": list(IMAGE_MEAN),
    "image_std": list(IMAGE_STD),
    "image_grid_pinpoints": [[384 * h, 384 * w] for h in range(1, 7) for w in range(1, 7)],
}


def match_preprocessor(config: LlavaNextConfig, settings: dict[str, Any]) -> LlavaNextConfig:
    """``config`` with an image processor's mean and deviation; a CLIP tower has none but its own.

    Raises ValueError, naming the one that is not three numbers.
    """
    if config.vision.model_type == CLIP:
        return config
    given = {**_DEFAULTS, **settings}
    mean, std = (
        tuple(value) if isinstance(value := given[name], list) else value
        for name in ("image_mean", "image_std")
    )
    vision = dataclasses.replace(config.vision, image_mean=mean, image_std=std)
    return dataclasses.replace(config, vision=vision)


def hf_processor(config: LlavaNextConfig, _: Preset) -> dict[str, Any]:
    """See :attr:`e5v_jax.families.base.Family.hf_processor`."""
    size, most, vision = config.vision.image_size, config.max_tiles, config.vision
    square = {"height": size, "width": size}
    if most is None:
        name = "LlavaNext"
        around: dict[str, Any] = {
            "patch_size": vision.patch_size,
            "num_additional_image_tokens": 1 if vision.has_class_token else 0,
        }
        tile: dict[str, Any] = {
            "size": {"shortest_edge": size},
            "do_center_crop": True,
            "crop_size": square,
        }
    else:
        name = "LlavaOnevision"
        around = {
            "num_image_tokens": vision.num_positions,
            "vision_aspect_ratio": f"anyres_max_{most}",
            "video_processor": {  # the processor cannot be loaded without one
                "video_processor_type": "LlavaOnevisionVideoProcessor"
            },
        }
        tile = {"size": square}
    return {
        "processor_class": f"{name}Processor",
        "image_token": IMAGE_PLACEHOLDER,
        "vision_feature_select_strategy": select_strategy(vision),
        **around,
        "image_processor": {
            "image_processor_type": f"{name}ImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            **tile,
            "resample": 3,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(vision.image_mean),
            "image_std": list(vision.image_std),
            "image_grid_pinpoints": [list(pinpoint) for pinpoint in config.image_grid_pinpoints],
        },
    }


def check_preprocessor(config: LlavaNextConfig, settings: dict[str, Any]) -> None:
    """Raise UnsupportedModelError, naming it, on a setting other than what is computed here."""
    size, most = config.vision.image_size, config.max_tiles
    square = {"height": size, "width": size}
    classes = [
        f"{name}{kind}"
        for name in (_NAMES if most is None else _ONEVISION_NAMES)
        for kind in (*_KINDS, "Processor")
    ]
    supported: dict[str, tuple[Any, ...]] = {
        "aspect_ratio_setting": ("anyres",),
        "do_convert_rgb": (True, None),
        "do_resize": (True,),
        "size": ({"shortest_edge": size}, square, size),
        "do_center_crop": (True, False, None),  # of a square tile nothing is cut off
        "crop_size": (square, size) if most is None else (square, size, None),
        "resample": (3,),  # bicubic
        "do_rescale": (True,),
        "rescale_factor": (1 / 255,),
        "do_normalize": (True,),
        "image_mean": (list(config.vision.image_mean),),
        "image_std": (list(config.vision.image_std),),
        "image_grid_pinpoints": ([list(pinpoint) for pinpoint in config.image_grid_pinpoints],),
        "patch_size": (config.vision.patch_size, None),
        "vision_feature_select_strategy": (select_strategy(config.vision), None),
        "image_token": (IMAGE_PLACEHOLDER,),
        "num_additional_image_tokens": (1 if config.vision.has_class_token else 0,),
        "pad_size": (None,),
        "size_divisor": (None,),
        **dict.fromkeys((*_TYPES, "processor_class", "_processor_class"), (*classes, None)),
    }
    if most is not None:
        supported["num_image_tokens"] = (config.vision.num_positions,)
        supported["vision_aspect_ratio"] = (f"anyres_max_{most}",)
    if any(name in settings for name in _TYPES):  # not those of the processor around it
        settings = {**(_DEFAULTS if most is None else _ONEVISION_DEFAULTS), **settings}
        if not any("CLIP" in str(settings.get(name)) for name in _TYPES):  # which has none
            settings.setdefault("image_grid_pinpoints", _PINPOINTS)
    check_settings(settings, supported, _IGNORED_SETTINGS)
