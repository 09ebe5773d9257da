"""What Qwen3-VL refuses: configurations, image processors, inputs, tokenizers."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hf_models import picture
from qwen_models import QwenCase, with_config

from e5v_jax import E5V
from e5v_jax.checkpoints.hf_source import open_source
from e5v_jax.families.qwen_vl import QWEN_VL
from e5v_jax.families.qwen_vl.processor import QwenVLProcessor
from e5v_jax.nn.config import UnsupportedModelError
from e5v_jax.presets import PRESETS

CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "qwen3_vl_moe"}, "model_type 'qwen3_vl_moe'"),
    ({"image_token_id": None}, "image_token_id"),
    ({"quantization_config": {}}, r"quantization_config is \{\}: this field is not known"),
    ({"text_config": None}, "text_config is None: expected an object"),
    ({"vision_config.in_channels": 1}, "vision_config.in_channels is 1: only 3"),
    ({"vision_config.temporal_patch_size": 1}, "vision_config.temporal_patch_size is 1: only 2"),
    ({"vision_config.hidden_act": "gelu"}, "vision_config.hidden_act 'gelu'"),
    ({"vision_config.window_size": 112}, "vision_config.window_size is 112: this field is not"),
    ({"vision_config.num_position_embeddings": 26}, "expected a square number"),
    ({"vision_config.num_heads": 5}, "not a multiple of num_heads 5"),
    ({"vision_config.num_heads": 8}, "expected a multiple of 4"),
    ({"vision_config.out_hidden_size": 63}, "out_hidden_size is 63"),
    ({"vision_config.deepstack_visual_indexes": [2, 0]}, "each once, in order"),
    ({"vision_config.deepstack_visual_indexes": [0, 4]}, "expected blocks from 0 to 3"),
    ({"vision_config.deepstack_visual_indexes": [0, 1, 2]}, "list.2.norm.weight: missing"),
    ({"vision_config.deepstack_visual_indexes": [0]}, "list.1.linear_fc1.bias: one too many"),
    (
        {"vision_config.rope_parameters": {"rope_type": "linear", "factor": 2}},
        "only rope_type 'axial'",
    ),
    ({"text_config.rope_parameters": {"rope_theta": 5, "mrope_section": [4, 4]}}, "mrope_section"),
]


@pytest.mark.parametrize(("changes", "message"), CONFIGS)
def test_configurations_that_are_refused(
    changes: dict[str, Any], message: str, qwen: Callable[[str], QwenCase], tmp_path: Path
) -> None:
    folder = with_config(qwen("tied"), tmp_path, changes)
    with pytest.raises(ValueError, match=message) as error:
        open_source(folder)
    assert "\n" not in str(error.value)


GOOD_SETTINGS: dict[str, Any] = {  # of Qwen3-VL's repositories
    "size": {"longest_edge": 16777216, "shortest_edge": 65536},
    "patch_size": 4,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "processor_class": "Qwen3VLProcessor",
    "image_processor_type": "Qwen2VLImageProcessorFast",
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        ({"image_mean": [0.48, 0.46, 0.41]}, "image_mean is"),
        ({"patch_size": 14}, "patch_size is 14: only 4"),
        ({"merge_size": 1}, "merge_size is 1"),
        ({"temporal_patch_size": 1}, "temporal_patch_size is 1"),
        ({"do_normalize": False}, "do_normalize is False"),
        ({"do_resize": False}, "do_resize is False"),
        ({"resample": 2}, "resample is 2: only 3"),
        ({"crop": 3}, "crop is 3: this setting is not known"),
        ({"image_processor_type": "CLIPImageProcessor"}, "image_processor_type is 'CLIP"),
    ],
)
def test_image_processors(
    changes: dict[str, Any], message: str | None, qwen: Callable[[str], QwenCase]
) -> None:
    settings = {**GOOD_SETTINGS, **changes}
    config = QWEN_VL.match_preprocessor(qwen("tied").e5v.config, settings)  # as a folder is read
    assert (config.min_pixels, config.max_pixels) == (65536, 16777216)
    if message is None:
        QWEN_VL.check_preprocessor(config, settings)
        with pytest.raises(UnsupportedModelError, match=r"say 65536 to 16777216 pixels, where"):
            QWEN_VL.check_preprocessor(qwen("tied").e5v.config, settings)
        return
    with pytest.raises(UnsupportedModelError, match=message):
        QWEN_VL.check_preprocessor(config, settings)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (picture(201, 1), "one side is more than 200 times the other"),
        ({"video": "a.mp4"}, "unknown key 'video'"),
        ("<|video_pad|>", r"contains '<\|video_pad\|>'"),
        ("<|image_pad|>", r"contains '<\|image_pad\|>'"),
    ],
)
def test_inputs_that_are_refused(item: Any, message: str, qwen: Callable[[str], QwenCase]) -> None:
    with pytest.raises(ValueError, match=f"^input 0: .*{message}"):
        qwen("tied").e5v.encode([item], special_tokens="refuse")


def test_limits_and_tokenizers_that_are_refused(
    qwen: Callable[[str], QwenCase], llava: Callable[[str], Any]
) -> None:
    case = qwen("tied")
    with pytest.raises(ValueError, match=r"^min_pixels 9: expected at most max_pixels, 8"):
        E5V.load_processor(case.folder, min_pixels=9, max_pixels=8)
    with pytest.raises(ValueError, match=r"would have 40000 patches, at most 7200"):
        E5V.load_processor(case.folder, max_pixels=10**6).measure_image((800, 800))
    with pytest.raises(ValueError, match="takes no images of any size"):
        E5V.load_processor(llava("mistral").folder, max_pixels=10**6)
    config = dataclasses.replace(case.e5v.config, image_token_id=9)
    with pytest.raises(ValueError, match=r"<\|image_pad\|> is token 261 .* is 9: they belong"):
        QwenVLProcessor(config, case.tokenizer, "chatml")
    with pytest.raises(ValueError, match=r"read at <\|endoftext\|>, but the prompt ends in"):
        case.load(template="chatml").encode(["a"])
    (measured,) = case.e5v.processor.measure(["A dog."], PRESETS["qwen3-vl-embedding"].choose())
    assert measured.ids[-1] == case.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert measured.ids.count(measured.ids[-1]) == 1
