"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: towers of native resolution, decoders with M-RoPE."""

from e5v_jax.families.base import Family
from e5v_jax.families.qwen_vl.config import QwenVLConfig
from e5v_jax.families.qwen_vl.layouts import exported_config
from e5v_jax.families.qwen_vl.model import build, example_batch, image_cost
from e5v_jax.families.qwen_vl.parameters import parameters
from e5v_jax.families.qwen_vl.preprocessor import (
    check_preprocessor,
    hf_processor,
    match_preprocessor,
)
from e5v_jax.families.qwen_vl.presets import ARCHITECTURES, CHECKPOINTS
from e5v_jax.families.qwen_vl.processor import QwenVLProcessor, image_shape, match_tokenizer

QWEN_VL = Family(
    read_config=QwenVLConfig.from_hf,
    config_from_dict=QwenVLConfig.from_dict,
    build=build,
    parameters=parameters,
    processor=QwenVLProcessor,
    example_batch=example_batch,
    image_shape=image_shape,
    image_cost=image_cost,
    match_tokenizer=match_tokenizer,
    hf_config=exported_config,
    match_preprocessor=match_preprocessor,
    check_preprocessor=check_preprocessor,
    hf_processor=hf_processor,
    architectures=ARCHITECTURES,
    checkpoints=CHECKPOINTS,
)
