"""E5-V's text-only recipe on Qwen3-VL-2B-Instruct: LoRA on a bf16 base, 768 NLI triplets a step.

python -m convert.from_hf Qwen/Qwen3-VL-2B-Instruct models/qwen3-vl-2b
python -m e5v_jax.train --config configs/e5v_qwen3_vl_2b.py
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
