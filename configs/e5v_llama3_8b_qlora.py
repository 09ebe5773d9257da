"""E5-V as the authors released it: NF4 base (QLoRA) and their script's prompt, 768 triplets a step.

    python -m e5v_jax.train --config configs/e5v_llama3_8b_qlora.py

Fits, by the dry run, one 16 GB chip: a v5e TPU (13 GiB) or a GPU (10 GiB, by formula). With more
devices or memory raise --chunk-size, to a multiple of the devices that divides 2304. On one v5e the
fastest found is --chunk-size 32 --remat dots --texts-per-row 4: a step is 31 seconds at best, not
40 (tpu/README.md). The authors trained on 32 V100.
"""

from pathlib import Path

from e5v_jax.train.config import DataConfig, TrainConfig


def get_config() -> TrainConfig:
    """As e5v_llama3_8b, with the base in 4 bits and gradient caching instead of 32 devices."""
    return TrainConfig(
        model=Path("models/llava-next-llama3-8b"),
        output=Path("runs/e5v-llama3-8b-qlora"),
        data=DataConfig(path=(Path("data/nli_for_simcse.csv"),), prompt="released"),
        quantize="nf4",
        chunk_size=64,
    )
