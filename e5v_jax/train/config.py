"""What a training run is: a frozen dataclass, filled by a file in ``configs/`` and by flags."""

import sys
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import tyro

from e5v_jax.cli import BucketPath
from e5v_jax.nn.layers import LoRAConfig
from e5v_jax.nn.quantized import Quantization
from e5v_jax.nn.remat import OFFLOADED, Remat
from e5v_jax.presets import HELP


@dataclass(frozen=True)
class DataConfig:
    """Training triplets (sent0, sent1, hard_neg) or plain pairs (sent0, sent1)."""

    path: tuple[BucketPath, ...] = ()
    """csv, jsonl or parquet files with columns sent0, sent1 and, if any, hard_neg; or image0,
    image1, hard_neg_image for images (docs/training.md)."""
    tfds: Literal["snli", "multi_nli"] | None = None  # Triplets of a tfds corpus, instead of files.
    tfds_dir: Path | None = None  # Where this corpus was prepared; None is its own default.
    max_tokens: int = 32  # Each sentence is cut to this many tokens before the template is applied.
    prompt: str = "text"
    """`text`, which is the preset's own; another name in e5v_jax.prompts.PROMPTS; or one of yours
    with <sent> in it. `released` is what E5-V's training script makes of it
    (prompts.fill_released)."""
    preset: Annotated[str | None, tyro.conf.arg(help=HELP)] = None
    template: str | None = None  # Chat template name; None takes the preset's.
    min_pixels: int | None = None  # Of images, where a model takes any size; None is the preset's.
    max_pixels: int | None = None  # Larger images are reduced to it: less work and memory.
    length_groups: int = 4  # Groups of similar length that a batch runs in, each padded alone.


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warmup and linear decay to zero (transformers' linear schedule)."""

    learning_rate: float = 4e-4
    warmup_steps: int = 100
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    accumulate_steps: int = 1
    """Change the parameters every so many steps, by the mean gradient. Each step keeps negatives of
    its own; for more negatives in little memory see --chunk-size."""


@dataclass(frozen=True)
class LossConfig:
    """InfoNCE (paper section 3.3) and what embedding trainers add to it."""

    temperature: float = 0.05
    matryoshka_dims: tuple[int, ...] = ()  # Train the first d dimensions as embeddings too, each d.
    bidirectional: bool = False  # Also find each sent0 among all sent0, from its sent1.
    mask_false_negatives: bool = False
    """Leave out negatives that are the same text as the anchor or its positive."""


@dataclass(frozen=True)
class MeshConfig:
    """Device mesh; one size may be -1 and takes the devices that are left."""

    data: int = 1
    fsdp: int = -1
    tensor: int = 1


@dataclass(frozen=True)
class EvaluationConfig:
    """STS-B dev at every checkpoint (paper's protocol, prompt `sts`); the run leaves the best."""

    data: Path | None = None  # Folder with STS/ in SentEval's layout; None does not evaluate.
    stride: int = 1  # Score every n-th pair only.


@dataclass(frozen=True)
class RunConfig:
    """What any training run is told, whatever its data and its loss."""

    command: ClassVar[str] = "train"
    """Which command's runs these are."""

    model: BucketPath  # Converted folder of the base model (python -m convert.from_hf).
    output: BucketPath
    """Run folder to write: checkpoints, metrics.jsonl, TensorBoard events, what was trained. Like
    model and data.path it may be in a bucket, gs://BUCKET/FOLDER."""
    verify: bool = False
    """First compare every file of the model with its checksum, as after a copy."""
    data: Any = None  # each command's own, as the next three
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    loss: Any = None
    evaluation: Any = None
    mesh: MeshConfig = field(default_factory=MeshConfig)
    # as a subcommand its flags would not be in --help and could not be given beside others
    lora: tyro.conf.AvoidSubcommands[LoRAConfig | None] = None
    """Low-rank adaptation of every decoder linear map."""
    batch_size: int = 256  # Rows per optimizer step, over all devices.
    num_epochs: int = 1
    max_steps: int | None = None  # Stop here, not after num_epochs; the schedule ends here too.
    chunk_size: int | None = None
    """Inputs in the model at a time: the same gradient as without, in less memory, for one more
    forward pass. Must divide the inputs of a step."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Compute dtype of the decoder; losses, norms and optimizer are fp32 always."""
    quantize: Quantization | None = None  # Of a frozen base (QLoRA); needs LoRA.
    remat: Remat = "full"
    """What the backward pass keeps per layer: none (all), dots (matmul outputs; dots_except_o and
    dots_except_mlp keep fewer of them), full (inputs); offload_ keeps it in the host's memory."""
    checkpoint_every: int = 100  # Steps between checkpoints; the last step is always saved.
    keep_checkpoints: int = 3  # Newest checkpoints kept.
    log_every: int = 10  # Steps between lines in metrics.jsonl and TensorBoard.
    seed: int = 42
    resume: bool = False  # Continue the run in `output` from its newest checkpoint.
    allow_change: tuple[str, ...] = ()
    """With --resume: fields that may differ from the run's own, such as data_fingerprint."""
    distributed: bool = False  # One process of several, also if the environment does not say so.
    wandb_project: str | None = None  # Also log to this project of wandb (pip install wandb).


@dataclass(frozen=True)
class TrainConfig(RunConfig):
    """One training run. The defaults are the paper's recipe (section 4.1 and the released code).

    --config FILE takes other defaults from a Python file: what its get_config() returns; the flags
    below override single fields. python -m e5v_jax.dryrun train tells what a step needs.
    """

    output: BucketPath
    """Run folder to write: checkpoints, metrics.jsonl, TensorBoard events, the final adapter. Like
    model and data.path it may be in a bucket, gs://BUCKET/FOLDER."""
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    lora: tyro.conf.AvoidSubcommands[LoRAConfig | None] = field(
        default_factory=lambda: LoRAConfig(rank=64, alpha=16.0, dropout=0.05)
    )
    """Low-rank adaptation of every decoder linear map; None, which only a configuration file can
    say, trains all decoder weights."""
    batch_size: int = 768  # Triplets per optimizer step, over all devices, negatives of each other.
    num_epochs: int = 2
    chunk_size: int | None = None
    """Sentences in the model at a time (gradient caching): the same gradient as without, in less
    memory, for one more forward pass. Must divide the sentences of a step."""
    texts_per_row: int = 1
    """Sentences that share a row of the decoder's: what all prompts begin with is computed once for
    them. Without dropout the gradient is the same; with it they share its masks there."""


_COUNTS = [
    "batch_size",
    "num_epochs",
    "max_steps",
    "chunk_size",
    "texts_per_row",
    "checkpoint_every",
    "keep_checkpoints",
    "log_every",
    "data.max_tokens",
    "data.length_groups",
    "data.min_pixels",
    "data.max_pixels",
    "optimizer.accumulate_steps",
    "evaluation.stride",
    "lora.rank",
]
# What every other number must be: (lowest, highest, whether the lowest is excluded).
_RANGES = {
    "seed": (0, 2**32 - 1, False),
    "loss.temperature": (0.0, 100.0, True),
    "optimizer.learning_rate": (0.0, 1.0, True),
    "optimizer.decoder_learning_rate": (0.0, 1.0, True),
    "optimizer.warmup_steps": (0, sys.maxsize, False),
    "optimizer.b1": (0.0, 1.0 - 1e-9, False),
    "optimizer.b2": (0.0, 1.0 - 1e-9, False),
    "optimizer.eps": (0.0, 1.0, True),
    "optimizer.weight_decay": (0.0, 1.0, False),
    "optimizer.max_grad_norm": (0.0, inf, True),
    "lora.alpha": (0.0, 1e6, True),
    "lora.dropout": (0.0, 1.0 - 1e-9, False),
}


def check_values(cfg: RunConfig) -> None:
    """Check that every number of a configuration can be meant, before anything is loaded.

    Raises ValueError: names the field that has another value.
    """
    if cfg.allow_change and not cfg.resume:
        raise ValueError(
            "allow_change: a new run has nothing to differ from; pass --resume with it"
        )
    if cfg.remat in OFFLOADED and cfg.chunk_size is not None:
        # a loop in a loop that fills the host's memory: XLA does not compile it for TPUs
        raise ValueError(
            f"remat: {cfg.remat} keeps a whole batch: leave chunk_size ({cfg.chunk_size}) out"
        )
    for name in _COUNTS:
        value = _value(cfg, name)
        if value is not None and value < 1:
            raise ValueError(f"{name}: {value}, expected at least 1")
    for name, (low, high, excluded) in _RANGES.items():
        value = _value(cfg, name)
        if value is not None and not (low < value <= high if excluded else low <= value <= high):
            above = f"more than {low:g}" if excluded else f"{low:g} or more"
            most = "" if high in (sys.maxsize, inf) else f" and at most {high:g}"
            raise ValueError(f"{name}: {value}, expected {above}{most}")
    for name in ("mesh.data", "mesh.fsdp", "mesh.tensor"):
        if (value := _value(cfg, name)) != -1 and value < 1:
            raise ValueError(f"{name}: {value}, expected at least 1, or -1 for what is left")
    for dim in _value(cfg, "loss.matryoshka_dims") or ():
        if dim < 1:
            raise ValueError(f"loss.matryoshka_dims: {dim}, expected at least 1 each")


def check_sizes(cfg: RunConfig, hidden_size: int) -> None:
    """Check what must not be larger than the model is wide. Raises ValueError: names the field."""
    rank = 0 if cfg.lora is None else cfg.lora.rank
    for name, values in {
        "lora.rank": (rank,),
        "loss.matryoshka_dims": _value(cfg, "loss.matryoshka_dims") or (),
    }.items():
        if max(values, default=0) > hidden_size:
            raise ValueError(
                f"{name}: {max(values)}, expected at most {hidden_size}, the model's hidden_size"
            )


def _value(cfg: RunConfig, name: str) -> Any:
    """The value of a field by its dotted name; None within a part that is None or has it not."""
    value: Any = cfg
    for part in name.split("."):
        value = getattr(value, part, None)
    return value
