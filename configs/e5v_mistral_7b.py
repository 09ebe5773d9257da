"""The paper's recipe on LLaVA-NeXT Mistral-7B; its prompt template is told from the tokenizer.

    python -m convert.from_hf llava-hf/llava-v1.6-mistral-7b-hf models/llava-next-mistral-7b
    python -m e5v_jax.train --config configs/e5v_mistral_7b.py

Fits where e5v_llama3_8b does: 16 v5e chips and more as it is, one 40 GB GPU with --chunk-size 96
(18 GiB), one 16 GB chip with --quantize nf4 --chunk-size 64 (9 GiB).
"""

from pathlib import Path

from e5v_jax.train.config import DataConfig, TrainConfig


def get_config() -> TrainConfig:
    """The recipe of e5v_llama3_8b, another base."""
    return TrainConfig(
        model=Path("models/llava-next-mistral-7b"),
        output=Path("runs/e5v-mistral-7b"),
        data=DataConfig(path=(Path("data/nli_for_simcse.csv"),)),
    )
