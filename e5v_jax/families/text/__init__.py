"""Text-only decoders: Llama, Mistral, SmolLM2, Qwen2, Qwen2.5, Qwen3."""

from e5v_jax.families.base import Family
from e5v_jax.families.text.config import TextModelConfig
from e5v_jax.families.text.model import TextModel, example_batch
from e5v_jax.families.text.parameters import parameters
from e5v_jax.families.text.processor import TextProcessor

TEXT = Family(
    read_config=TextModelConfig.from_hf,
    config_from_dict=TextModelConfig.from_dict,
    build=TextModel,
    parameters=parameters,
    processor=TextProcessor,
    example_batch=example_batch,
)
