"""What an evaluation is: a frozen dataclass, filled by flags or by a file in ``configs/``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from e5v_jax.cli import BucketPath


@dataclass(frozen=True)
class EvaluateConfig:
    """Score a model on the benchmarks of the paper and show the scores beside the paper's.

    --config FILE takes defaults from a Python file: what its get_config() returns.
    `python -m e5v_jax.evaluate analyse --help`: what the embedding space looks like.
    """

    model: str | None = None
    """Converted folder, Hugging Face folder or GGUF file, or a hub id."""
    data: Path | None = None
    """Folder with the benchmarks, laid out as docs/evaluation.md says; for `retrieval` and
    `i2i-retrieval` the one that holds captions.jsonl; `hub` fetches the authors' data sets."""
    tasks: str = "sts"
    """Comma-separated: sts (the seven of the paper) or single ones (sts12 to sts16, stsb, sickr,
    stsb-dev), flickr30k, coco, i2i-flickr30k, i2i-coco, cirr (validation), cirr-test (writes the
    submission for CIRR's server), fashioniq (its three types) or fashioniq-dress and so on,
    retrieval and i2i-retrieval (your own captioned images)."""
    compare: tuple[Path, Path] | None = None
    """Instead of all else: the outputs of two runs, to compare them item by item."""
    stride: int = 1
    """Score every n-th pair, image or query only: a quick look, not comparable with the paper."""
    protocol: Literal["paper", "plain"] = "paper"
    """Of STS. paper: prompt `sts`, sentences cleaned as the authors do. plain: the instruction
    without spaces around it, sentences as they stand in the files: not the paper's figure."""
    output: Path | None = None
    """Folder to write results.json, results.md and items.npz to; must be empty or not exist."""
    cache: Path | None = None
    """Folder to keep embeddings in: what is there for this model is not embedded again."""
    adapter: BucketPath | None = None
    """LoRA to apply: a run folder of e5v_jax.train, one of its checkpoints, or a PEFT folder."""
    template: str | None = None
    """Chat template: llama3, mistral, phi3, chatml or vicuna; by default told from the model."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Precision of weights and arithmetic."""
    quantize: Literal["int8", "nf4"] | None = None
    """Store the decoder's weights in 8 or 4 bits: less memory, slightly other scores."""
    fsdp: int = 1
    """Devices over which weights and batch are split; the rest share batches."""
    tensor: int = 1
    """Devices over which heads and MLP columns are split."""
    batch_size: int = 32
    """Inputs per device batch."""
