"""What an alignment run is: what every run is told, and its captions."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro

from e5v_jax.presets import HELP
from e5v_jax.train.config import OptimizerConfig, RunConfig


@dataclass(frozen=True)
class CaptionsConfig:
    """Images with captions."""

    path: tuple[Path, ...] = ()
    """Folders with captions.jsonl ({"image": "a.jpg", "captions": ["...", ...]} on each line) and
    the images, in it or in images/; Parquet files with columns image (an encoded image, kept in
    memory) and captions (texts)."""
    captions: Literal["one", "all"] = "one"
    """Of each image in an epoch: one, the next one in every epoch; or all, behind the image in one
    row, where none sees another: the loss of as many rows, at little more than the work of one."""
    features: Path | None = None
    """Folder for what the frozen tower makes of each image, computed once and kept; None computes
    it in every step."""
    max_tokens: int = 64  # A longer caption is cut to this many tokens, and has no end then.
    prompt: str | None = None
    """What stands before a caption: None takes what the preset says with an image; or one of yours
    with <image> in it."""
    end: str | None = None
    """The token that ends a caption; None takes the one that ends a turn in the chat template, and
    in a template without one the tokenizer's EOS."""
    preset: Annotated[str | None, tyro.conf.arg(help=HELP)] = None
    template: str | None = None  # Chat template name; None takes the preset's.
    min_pixels: int | None = None  # Of images, where a model takes any size; None is the preset's.
    max_pixels: int | None = None  # Larger images are reduced to it: less work and memory.


@dataclass(frozen=True)
class AlignOptimizerConfig(OptimizerConfig):
    """AdamW with linear warmup and linear decay to zero (transformers' linear schedule)."""

    learning_rate: float = 1e-3
    decoder_learning_rate: float | None = None
    """Of the decoder or its LoRA factors, under the same schedule; None takes learning_rate."""


@dataclass(frozen=True)
class CaptionEvaluationConfig:
    """Caption loss at every checkpoint, by each image's first caption; the run leaves the best."""

    data: Path | None = None  # One as of data.path, of other images; None does not evaluate.
    stride: int = 1  # Take every n-th image only.


@dataclass(frozen=True)
class AlignConfig(RunConfig):
    """Train what connects a vision tower to a decoder, by next-token loss on captions.

    That is LLaVA's first stage (arXiv 2304.08485, section 4.2), with its batch size and learning
    rate. RUN/model is a converted folder, from which e5v_jax.train goes on. --config FILE takes
    other defaults from a Python file: what its get_config() returns; the flags below override
    single fields.
    """

    command: ClassVar[str] = "align"

    output: Path
    """Run folder to write: checkpoints, metrics.jsonl, TensorBoard events, the aligned model."""
    data: CaptionsConfig = field(default_factory=CaptionsConfig)
    optimizer: AlignOptimizerConfig = field(default_factory=AlignOptimizerConfig)
    loss: tyro.conf.Suppress[None] = None  # there is nothing to choose
    evaluation: CaptionEvaluationConfig = field(default_factory=CaptionEvaluationConfig)
    train: Literal["projector", "decoder"] = "projector"
    """The projector alone, or with it all weights of the decoder. The tower stays as it is."""
    projector_start: Literal["model", "words"] = "model"
    """Where LLaVA's projector starts: as the model has it, or from ridge regression of the features
    (data.features) on the embeddings of the captions' words, in closed form (align/words.py)."""
    chunk_size: int | None = None
    """Images in the model at a time: the same gradient as without, in less memory, for one more
    forward pass. Must divide batch_size."""
