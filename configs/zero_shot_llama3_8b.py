"""What the prompt alone does: LLaVA-NeXT Llama-3-8B without training, on STS, Flickr30K and COCO.

    python -m e5v_jax.evaluate --config configs/zero_shot_llama3_8b.py --output runs/zero-shot

Runs where 8 B parameters in bf16 (16 GB) and five images (3 GiB) fit: a 24 GB GPU, or a TPU chip of
32 GB. The paper has 75.8 on STS (average), and recall at 5 of 82.8 and 90.4 on Flickr30K.
"""

from pathlib import Path

from e5v_jax.evaluate.config import EvaluateConfig


def get_config() -> EvaluateConfig:
    """The base model as it is: no adapter."""
    return EvaluateConfig(
        model="models/llava-next-llama3-8b",
        data=Path("data"),
        tasks="sts,flickr30k,coco",
        cache=Path("runs/embeddings"),
    )
