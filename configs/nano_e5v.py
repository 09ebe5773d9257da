"""The paper's idea at a thousandth of its size: text pairs alone, on the model that was aligned.

The base is what a run of configs/nano_align.py leaves. On two CPU cores a step of 24 triplets takes
seconds and 24 of them are enough to see the effect on photographs (docs/results.md). Give the
triplets: ``--data.path FILE``.
"""

from pathlib import Path

from e5v_jax.nn.layers import LoRAConfig
from e5v_jax.train.config import OptimizerConfig, TrainConfig


def get_config() -> TrainConfig:
    """LoRA r 16 on every linear map of the decoder, fp32, 24 steps of 24 triplets."""
    return TrainConfig(
        model=Path("runs/photographs/aligned/model"),
        output=Path("runs/photographs/e5v"),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=5),
        lora=LoRAConfig(rank=16, alpha=32.0, dropout=0.0),
        batch_size=24,
        max_steps=24,
        dtype="float32",
        remat="dots",
        log_every=1,
    )
