"""What a configuration of the original LLaVA code must say: what is computed here.

The names are those of ``llava/model`` and ``llava/train`` in haotian-liu/LLaVA and
LLaVA-VL/LLaVA-NeXT.
"""

from typing import Any

from e5v_jax.nn.config import UnsupportedModelError

# Values under which it computes what is computed here, and what it takes a missing key for.
_ACCEPTED: dict[str, tuple[tuple[Any, ...], Any]] = {
    "mm_projector_type": (("mlp2x_gelu",), "linear"),
    "mm_patch_merge_type": (("spatial_unpad",), "flat"),
    "mm_vision_select_feature": (("patch",), "patch"),
    "image_aspect_ratio": (("anyres",), "square"),
    "mm_resampler_type": ((None,), None),
    "mm_use_im_start_end": ((False, None), False),  # else <im_start> and <im_end> around an image
    "s2": ((False, None), False),  # several scales
}
_REQUIRED = ("mm_vision_tower", "mm_vision_select_layer", "image_grid_pinpoints", "mm_hidden_size")
_IGNORED = {
    **dict.fromkeys(
        (
            *("mm_tunable_parts", "mm_projector_lr", "mm_vision_tower_lr"),
            *("tune_mm_mlp_adapter", "tune_mm_vision_resampler", "freeze_mm_mlp_adapter"),
            *("freeze_mm_vision_resampler", "unfreeze_mm_vision_tower", "use_pos_skipping"),
            *("pos_skipping_range", "pretrain_mm_mlp_adapter"),
        ),
        "how it was trained",
    ),
    **dict.fromkeys(
        (
            *("mm_newline_position", "mm_spatial_pool_stride", "mm_spatial_pool_mode"),
            *("mm_spatial_pool_out_channels", "add_faster_video", "faster_token_stride"),
            *("add_time_instruction", "force_sample"),
        ),
        "how frames of videos are put together, or a resampler that is refused",
    ),
    **dict.fromkeys(
        ("image_crop_resolution", "image_split_resolution"), "of other values of image_aspect_ratio"
    ),
    "mm_use_im_patch_token": "a token of the tokenizer, which no prompt has",
    **dict.fromkeys(("use_mm_proj", "vision_tower_pretrained"), "never read again"),
    "image_token_id": "followed where it is there",
    **dict.fromkeys(
        ("tokenizer_padding_side", "tokenizer_model_max_length"),
        "padding makes no difference, and a sequence is refused rather than cut",
    ),
}
_PREFIXES = (
    "mm_",
    "image_",
    "tune_",
    "freeze_",
    "unfreeze_",
    "use_mm",
    "use_im",
    "s2",
    "tokenizer_",
)


def check_original(raw: dict[str, Any]) -> None:
    """Raise UnsupportedModelError, naming it, on a key with another meaning than is computed."""
    for key in _REQUIRED:
        if key not in raw:
            raise UnsupportedModelError(f"config.json has no {key!r}")
    for key, (accepted, missing) in _ACCEPTED.items():
        if raw.get(key, missing) not in accepted:
            found = f"is {raw[key]!r}" if key in raw else f"is not there, which means {missing!r}"
            raise UnsupportedModelError(f"{key} {found}: only {accepted[0]!r} is supported")
    known = {*_ACCEPTED, *_REQUIRED, *_IGNORED}
    for key in sorted(raw.keys() - known):
        if key.startswith(_PREFIXES):
            raise UnsupportedModelError(f"{key} is {raw[key]!r}: this key is not known")
