"""SmolLM2-135M on the triplets that ship with the project: minutes on two CPU cores, about 4 GB.

``make demo`` runs it with an evaluation before and after. To train on data of your own:
``python -m e5v_jax.train --config configs/demo.py --data.path my.csv --output runs/mine``.
"""

from pathlib import Path

from e5v_jax.nn.layers import LoRAConfig
from e5v_jax.train.config import DataConfig, OptimizerConfig, TrainConfig

HERE = Path(__file__).parent


def get_config() -> TrainConfig:
    """LoRA r 16 on every linear map, fp32, 2 epochs of 36 triplets a step."""
    return TrainConfig(
        model=Path("runs/demo/base"),
        output=Path("runs/demo/run"),
        data=DataConfig(path=(HERE / "train.csv",)),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=5),
        lora=LoRAConfig(rank=16, alpha=32.0, dropout=0.0),
        batch_size=36,
        num_epochs=2,
        dtype="float32",
        remat="dots",
        log_every=1,
        checkpoint_every=10,
    )
