"""E5-V's text-only recipe on Qwen3-VL-2B-Instruct: LoRA on a bf16 base, 768 NLI triplets a step.

python -m convert.from_hf Qwen/Qwen3-VL-2B-Instruct models/qwen3-vl-2b
python -m e5v_jax.train --config configs/e5v_qwen3_vl_2b.py

Fits, by the dry run (64 tokens a sentence, no dropout; hours of 718 steps at best, a real run is
slower): one v5e chip (6.6 GiB, 1.7 h), four v5e (0.4 h), one v6e (6.7 GiB, 0.4 h), four v5p (0.2
h), one H100 (by formula, 5 GiB, 0.3 h). The tower is needed to embed images afterwards.
"""

from pathlib import Path

from e5v_jax.train.config import DataConfig, TrainConfig


def get_config() -> TrainConfig:
    """The paper's recipe; nobody has published it on this backbone, so there is no score to reach.

    The prompt is E5-V's in the backbone's own chat template; the tower takes no part.
    """
    return TrainConfig(
        model=Path("models/qwen3-vl-2b"),
        output=Path("runs/e5v-qwen3-vl-2b"),
        data=DataConfig(path=(Path("data/nli_for_simcse.csv"),)),
        chunk_size=96,
    )
