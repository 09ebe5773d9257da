"""SmolLM2-135M learns to see: projector and LoRA on captions, behind the tower of a ViT-S/14.

The base is what ``e5v-compose`` makes of both (docs/align.md): 36 tokens for a photograph of
224x224 pixels, since its patches are pooled by 4. A step shows 8 images with all their captions,
40 or so, and takes seconds on two CPU cores once the features of the images are on disk. Give the
photographs: ``--data.path FOLDER_OR_PARQUET``.
"""

from pathlib import Path

from e5v_jax.align.config import AlignConfig, AlignOptimizerConfig, CaptionsConfig
from e5v_jax.nn.layers import LoRAConfig


def get_config() -> AlignConfig:
    """LoRA r 16 on every linear map of the decoder, fp32, 450 steps of 8 images."""
    return AlignConfig(
        model=Path("runs/photographs/base"),
        output=Path("runs/photographs/aligned"),
        data=CaptionsConfig(
            captions="all", max_tokens=18, features=Path("runs/photographs/features")
        ),
        optimizer=AlignOptimizerConfig(
            learning_rate=5e-4, decoder_learning_rate=1e-3, warmup_steps=20
        ),
        lora=LoRAConfig(rank=16, alpha=32.0, dropout=0.0),
        projector_start="words",
        batch_size=8,
        num_epochs=2,
        max_steps=450,
        dtype="float32",
        remat="none",
        checkpoint_every=250,
    )
