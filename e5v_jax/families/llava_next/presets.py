"""Architectures by name, for what needs no weights: the dry run and benchmarks."""

from e5v_jax.families.llava_next.config import KNOWN_VISION_TOWERS, LlavaNextConfig
from e5v_jax.nn.config import TextConfig, VisionConfig

_VISION = VisionConfig(**KNOWN_VISION_TOWERS["openai/clip-vit-large-patch14-336"])
_PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))  # (height, width)


def _llava_next(text: TextConfig, image_token_id: int) -> LlavaNextConfig:
    return LlavaNextConfig(
        text=text,
        vision=_VISION,
        vision_feature_layer=-2,
        image_token_id=image_token_id,
        image_grid_pinpoints=_PINPOINTS,
    )


# config.json of the checkpoints named in the comments
ARCHITECTURES: dict[str, LlavaNextConfig] = {
    # royokong/e5-v, llava-hf/llama3-llava-next-8b-hf
    "llava-next-llama3-8b": _llava_next(
        TextConfig(
            vocab_size=128320,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
            rms_norm_eps=1e-5,
            rope_theta=500000.0,
            max_position_embeddings=8192,
            model_type="llama",
        ),
        image_token_id=128256,
    ),
    # llava-hf/llava-v1.6-mistral-7b-hf
    "llava-next-mistral-7b": _llava_next(
        TextConfig(
            vocab_size=32064,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
            rms_norm_eps=1e-5,
            rope_theta=1e6,
            max_position_embeddings=32768,
            model_type="mistral",
        ),
        image_token_id=32000,
    ),
    # llava-hf/llava-v1.6-vicuna-7b-hf
    "llava-next-vicuna-7b": _llava_next(
        TextConfig(
            vocab_size=32064,
            hidden_size=4096,
            intermediate_size=11008,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=32,
            head_dim=128,
            rms_norm_eps=1e-5,
            rope_theta=10000.0,
            max_position_embeddings=4096,
            model_type="llama",
        ),
        image_token_id=32000,
    ),
    # llava-hf/llava-v1.6-vicuna-13b-hf
    "llava-next-vicuna-13b": _llava_next(
        TextConfig(
            vocab_size=32064,
            hidden_size=5120,
            intermediate_size=13824,
            num_hidden_layers=40,
            num_attention_heads=40,
            num_key_value_heads=40,
            head_dim=128,
            rms_norm_eps=1e-5,
            rope_theta=10000.0,
            max_position_embeddings=4096,
            model_type="llama",
        ),
        image_token_id=32000,
    ),
}

CHECKPOINTS = {
    "e5-v": "llava-next-llama3-8b",
    ".*llama3-8b.*": "llava-next-llama3-8b",
    ".*mistral-7b.*": "llava-next-mistral-7b",
    ".*vicuna-7b.*": "llava-next-vicuna-7b",
    ".*vicuna-13b.*": "llava-next-vicuna-13b",
}
"""Patterns of names of model folders, and the architecture that they say."""
