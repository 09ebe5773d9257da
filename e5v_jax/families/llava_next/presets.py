"""Architectures of published checkpoints by name, for what needs no weights."""

from dataclasses import replace

from e5v_jax.families.llava_next.config import KNOWN_VISION_TOWERS, LlavaNextConfig
from e5v_jax.nn.text_config import TextConfig
from e5v_jax.nn.vision_config import SIGLIP, VisionConfig


def _llava_next(text: TextConfig, image_token_id: int) -> LlavaNextConfig:
    return LlavaNextConfig(
        text=text,
        vision=VisionConfig(**KNOWN_VISION_TOWERS["openai/clip-vit-large-patch14-336"]),
        vision_feature_layer=-2,
        image_token_id=image_token_id,
        image_grid_pinpoints=((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)),
    )


_LLAMA3_8B = TextConfig(
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
)
_MISTRAL_7B = replace(
    _LLAMA3_8B,
    vocab_size=32064,
    rope_theta=1e6,
    max_position_embeddings=32768,
    model_type="mistral",
)
_VICUNA_7B = replace(
    _LLAMA3_8B,
    vocab_size=32064,
    intermediate_size=11008,
    num_key_value_heads=32,
    rope_theta=10000.0,
    max_position_embeddings=4096,
)
_VICUNA_13B = replace(
    _VICUNA_7B,
    hidden_size=5120,
    intermediate_size=13824,
    num_hidden_layers=40,
    num_attention_heads=40,
    num_key_value_heads=40,
)
# Qwen2-7B with rows for `<image>` and `<video>`, filled up to a multiple of 64 as transformers'
# convert_llava_onevision_weights_to_hf.py does it, which also leaves SigLIP's last block out
_QWEN2_7B = TextConfig(
    vocab_size=152128,
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    head_dim=128,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    max_position_embeddings=32768,
    model_type="qwen2",
    qkv_bias=True,
)
_ONEVISION_QWEN2_7B = LlavaNextConfig(
    text=_QWEN2_7B,
    vision=VisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=26,
        num_attention_heads=16,
        image_size=384,
        patch_size=14,
        layer_norm_eps=1e-6,
        hidden_act="gelu_pytorch_tanh",
        model_type=SIGLIP,
        image_mean=(0.5, 0.5, 0.5),
        image_std=(0.5, 0.5, 0.5),
    ),
    vision_feature_layer=-1,
    image_token_id=151646,
    image_grid_pinpoints=tuple((384 * h, 384 * w) for h in range(1, 7) for w in range(1, 7)),
    max_tiles=9,
)
# config.json of royokong/e5-v (llava-hf/llama3-llava-next-8b-hf) and llava-hf/llava-v1.6-*-hf
ARCHITECTURES: dict[str, LlavaNextConfig] = {
    "llava-next-llama3-8b": _llava_next(_LLAMA3_8B, image_token_id=128256),
    "llava-next-mistral-7b": _llava_next(_MISTRAL_7B, image_token_id=32000),
    "llava-next-vicuna-7b": _llava_next(_VICUNA_7B, image_token_id=32000),
    "llava-next-vicuna-13b": _llava_next(_VICUNA_13B, image_token_id=32000),
    "llava-onevision-qwen2-7b": _ONEVISION_QWEN2_7B,
}
CHECKPOINTS = {
    "e5-v": "llava-next-llama3-8b",
    "unime-llava-onevision-7b": "llava-onevision-qwen2-7b",
    **{f".*{name.removeprefix('llava-next-')}.*": name for name in ARCHITECTURES},
}
"""Patterns of names of model folders, and the architecture that they say."""
