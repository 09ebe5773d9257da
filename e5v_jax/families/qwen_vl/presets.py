"""Architectures of published Qwen-VL checkpoints by name, for what needs no weights."""

from dataclasses import replace

from e5v_jax.families.qwen_vl.config import QwenVisionConfig, QwenVLConfig
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


def _qwen3_vl(text: TextConfig, vision: QwenVisionConfig) -> QwenVLConfig:
    return QwenVLConfig(
        text=text,
        vision=vision,
        image_token_id=151655,
        vision_start_token_id=151652,
        vision_end_token_id=151653,
    )


ARCHITECTURES: dict[str, QwenVLConfig] = {
    "qwen3-vl-2b": _qwen3_vl(_TEXT_2B, _TOWER_2B),
    "qwen3-vl-4b": _qwen3_vl(_TEXT_4B, replace(_TOWER_2B, out_hidden_size=2560)),
    "qwen3-vl-8b": _qwen3_vl(_TEXT_8B, _TOWER_8B),
}
CHECKPOINTS = {f".*qwen3-vl.*-{size}b.*": f"qwen3-vl-{size}b" for size in (2, 4, 8)}
"""Patterns of names of model folders, and the architecture that they say."""
