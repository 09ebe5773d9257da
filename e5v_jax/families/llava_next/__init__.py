"""LLaVA-NeXT: vision tower, two-layer projector, anyres tiles, Llama or Mistral decoder."""

from e5v_jax.families.base import Family
from e5v_jax.families.llava_next.config import LlavaNextConfig, transformers_layout
from e5v_jax.families.llava_next.model import build, example_batch, image_cost
from e5v_jax.families.llava_next.parameters import parameters
from e5v_jax.families.llava_next.preprocessor import (
    check_preprocessor,
    hf_processor,
    match_preprocessor,
)
from e5v_jax.families.llava_next.presets import ARCHITECTURES, CHECKPOINTS
from e5v_jax.families.llava_next.processor import (
    LlavaNextProcessor,
    image_shape,
    match_tokenizer,
)

LLAVA_NEXT = Family(
    read_config=LlavaNextConfig.from_hf,
    config_from_dict=LlavaNextConfig.from_dict,
    build=build,
    parameters=parameters,
    processor=LlavaNextProcessor,
    example_batch=example_batch,
    image_shape=image_shape,
    image_cost=image_cost,
    projector=("multi_modal_projector", "image_newline"),
    match_tokenizer=match_tokenizer,
    hf_config=transformers_layout,
    match_preprocessor=match_preprocessor,
    check_preprocessor=check_preprocessor,
    hf_processor=hf_processor,
    architectures=ARCHITECTURES,
    checkpoints=CHECKPOINTS,
)
