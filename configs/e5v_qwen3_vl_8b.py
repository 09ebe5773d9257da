"""E5-V's text-only recipe on Qwen3-VL-8B-Instruct: LoRA on an NF4 base, 768 NLI triplets a step.

python -m convert.from_hf Qwen/Qwen3-VL-8B-Instruct models/qwen3-vl-8b
python -m e5v_jax.train --config configs/e5v_qwen3_vl_8b.py

Fits, by the dry run (64 tokens a sentence, no dropout; hours of 718 steps at best, a real run is
slower): one v5e chip (13.3 GiB, 8.0 h), four v5e (8.6 GiB, 2.0 h), one v6e (13.3 GiB, 3.9 h), four
v5p (0.9 h), one H100 (by formula, 10 GiB, 1.6 h).
"""

from pathlib import Path

from e5v_jax.train.config import DataConfig, TrainConfig


def get_config() -> TrainConfig:
    """As e5v_qwen3_vl_2b, with the base in 4 bits."""
    return TrainConfig(
        model=Path("models/qwen3-vl-8b"),
        output=Path("runs/e5v-qwen3-vl-8b"),
        data=DataConfig(path=(Path("data/nli_for_simcse.csv"),)),
        quantize="nf4",
        chunk_size=64,
    )
