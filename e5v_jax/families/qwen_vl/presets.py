"""Architectures of published Qwen-VL checkpoints by name, for what needs no weights."""

from dataclasses import replace

from e5v_jax.families.qwen_vl.config import QwenVLConfig
from e5v_jax.families.qwen_vl.vision_config import QWEN2, QWEN2_5, QwenVisionConfig
from e5v_jax.nn.text_config import TextConfig

# config.json of Qwen/Qwen3-VL-{2B,8B}-Instruct and -Embedding; of the 4B, maxtext's
_TEXT_2B = TextConfig(
    vocab_size=151936,
    hidden_size=2048,
    intermediate_size=6144,
    num_hidden_layers=28,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    rms_norm_eps=1e-6,
    rope_theta=5e6,
    max_position_embeddings=262144,
    model_type="qwen3_vl_text",
    qk_norm=True,
    mrope_section=(24, 20, 20),
    mrope_interleaved=True,
)
_TEXT_4B = replace(
    _TEXT_2B,
    hidden_size=2560,
    intermediate_size=9728,
    num_hidden_layers=36,
    num_attention_heads=32,
)
_TEXT_8B = replace(_TEXT_4B, hidden_size=4096, intermediate_size=12288)
_TOWER_2B = QwenVisionConfig(
    depth=24,
    hidden_size=1024,
    intermediate_size=4096,
    num_heads=16,
    patch_size=16,
    spatial_merge_size=2,
    out_hidden_size=2048,
    num_position_embeddings=2304,
    rope_theta=10000.0,
    hidden_act="gelu_pytorch_tanh",
    deepstack_visual_indexes=(5, 11, 17),
)
_TOWER_8B = replace(
    _TOWER_2B,
    depth=27,
    hidden_size=1152,
    intermediate_size=4304,
    out_hidden_size=4096,
    deepstack_visual_indexes=(8, 16, 24),
)

# config.json of Qwen/Qwen2-VL-{2B,7B}-Instruct and Qwen2.5-VL-{3B,7B}-Instruct
_OLD_2B = TextConfig(
    vocab_size=151936,
    hidden_size=1536,
    intermediate_size=8960,
    num_hidden_layers=28,
    num_attention_heads=12,
    num_key_value_heads=2,
    head_dim=128,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    max_position_embeddings=32768,
    model_type="qwen2_vl_text",
    qkv_bias=True,
    mrope_section=(16, 24, 24),
)
_OLD_7B = replace(
    _OLD_2B,
    vocab_size=152064,
    hidden_size=3584,
    intermediate_size=18944,
    num_attention_heads=28,
    num_key_value_heads=4,
)
_TEXT_2_5_3B = replace(
    _OLD_2B,
    hidden_size=2048,
    intermediate_size=11008,
    num_hidden_layers=36,
    num_attention_heads=16,
    max_position_embeddings=128000,
    model_type="qwen2_5_vl_text",
)
_TEXT_2_5_7B = replace(_OLD_7B, max_position_embeddings=128000, model_type="qwen2_5_vl_text")
_TOWER_2 = QwenVisionConfig(
    depth=32,
    hidden_size=1280,
    intermediate_size=5120,
    num_heads=16,
    patch_size=14,
    spatial_merge_size=2,
    out_hidden_size=1536,
    rope_theta=10000.0,
    hidden_act="quick_gelu",
    model_type=QWEN2,
)
_TOWER_2_5 = replace(
    _TOWER_2,
    intermediate_size=3420,
    hidden_act="silu",
    model_type=QWEN2_5,
    window_size=112,
    fullatt_block_indexes=(7, 15, 23, 31),
)


def _qwen_vl(text: TextConfig, vision: QwenVisionConfig) -> QwenVLConfig:
    return QwenVLConfig(
        text=text,
        vision=replace(vision, out_hidden_size=text.hidden_size),
        image_token_id=151655,
        vision_start_token_id=151652,
        vision_end_token_id=151653,
    )


ARCHITECTURES: dict[str, QwenVLConfig] = {
    "qwen2-vl-2b": _qwen_vl(_OLD_2B, _TOWER_2),
    "qwen2-vl-7b": _qwen_vl(_OLD_7B, _TOWER_2),
    "qwen2.5-vl-3b": _qwen_vl(_TEXT_2_5_3B, _TOWER_2_5),
    "qwen2.5-vl-7b": _qwen_vl(_TEXT_2_5_7B, _TOWER_2_5),
    "qwen3-vl-2b": _qwen_vl(_TEXT_2B, _TOWER_2B),
    "qwen3-vl-4b": _qwen_vl(_TEXT_4B, _TOWER_2B),
    "qwen3-vl-8b": _qwen_vl(_TEXT_8B, _TOWER_8B),
}
CHECKPOINTS = {
    **{f".*qwen3-vl.*-{size}b.*": f"qwen3-vl-{size}b" for size in (2, 4, 8)},
    **{f".*qwen2-vl.*-{size}b.*": f"qwen2-vl-{size}b" for size in (2, 7)},  # gme, unite too
    **{f".*qwen2\\.5-?vl.*-{size}b.*": f"qwen2.5-vl-{size}b" for size in (3, 7)},  # lamra too
    **{f"nomic-embed-multimodal-{size}b": f"qwen2.5-vl-{size}b" for size in (3, 7)},
    "lamra-ret.*qwen2\\.5vl-7b": "qwen2.5-vl-7b",
    "lamra-ret(-pretrained)?": "qwen2-vl-7b",
    "vlm2vec-v2.*": "qwen2-vl-2b",
    "jina-embeddings-v4": "qwen2.5-vl-3b",
}
"""Patterns of names of model folders, and the architecture that they say."""
