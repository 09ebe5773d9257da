"""LCO-Embedding's text-only recipe (arXiv 2510.11693) on Qwen2.5-VL-7B: 60.4 on MIEB-lite.

python -m convert.from_hf Qwen/Qwen2.5-VL-7B-Instruct models/qwen2.5-vl-7b
python -m e5v_jax.train --config configs/lco_qwen2_5_vl_7b.py

Fits, by the dry run (64 tokens a sentence, no dropout; hours of 718 steps at best, a real run is
slower): one v5e chip (12.3 GiB, 7.5 h), four v5e (8.3 GiB, 2.0 h), one v6e (12.0 GiB, 3.0 h), four
v5p (0.8 h), one H100 (by formula, 9.3 GiB, 1.5 h). The authors report 9.3 hours of an H20.
"""

from pathlib import Path

from e5v_jax.train.config import DataConfig, LossConfig, TrainConfig


def get_config() -> TrainConfig:
    """E5-V's data, LoRA, learning rate and batch; its prompt, temperature and backbone are its own.

    As Training/train_VL_any2any.py: NF4 base, LoRA r 64, alpha 16, dropout 0.05, one-way InfoNCE
    with hard negatives at temperature 0.03, linear schedule with 100 steps of warmup. Sentences are
    cut at 128 tokens, theirs at 650 with the prompt.
    """
    return TrainConfig(
        model=Path("models/qwen2.5-vl-7b"),
        output=Path("runs/lco-qwen2.5-vl-7b"),
        data=DataConfig(
            path=(Path("data/nli_for_simcse.csv"),), preset="lco-embedding", max_tokens=128
        ),
        loss=LossConfig(temperature=0.03),
        quantize="nf4",
        chunk_size=64,
    )
