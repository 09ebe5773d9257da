"""E5-V as in the paper: LLaVA-NeXT Llama-3-8B, LoRA on a bf16 base, 768 NLI triplets a step.

    python -m convert.from_hf lmms-lab/llama3-llava-next-8b models/llava-next-llama3-8b
    python -m e5v_jax.train --config configs/e5v_llama3_8b.py

Fits, by the dry run: 16 v5e chips and more (10 GiB each); 8 v5e with --chunk-size 384 (8 GiB); four
v5e with --chunk-size 256 (10 GiB); one 40 GB GPU with --chunk-size 96 (19 GiB). On less, the qlora
configuration beside this one.
"""

from pathlib import Path

from e5v_jax.train.config import DataConfig, TrainConfig


def get_config() -> TrainConfig:
    """The defaults of TrainConfig are the recipe: 2 epochs of SimCSE's 275,601 rows, 718 steps.

    The paper's text says 1000 steps, its code 2 epochs: --num-epochs 3 --max-steps 1000 for those.
    """
    return TrainConfig(
        model=Path("models/llava-next-llama3-8b"),
        output=Path("runs/e5v-llama3-8b"),
        data=DataConfig(path=(Path("data/nli_for_simcse.csv"),)),
    )
