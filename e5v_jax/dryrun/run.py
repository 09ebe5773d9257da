"""The dry run of training and of encoding, from their flags to a report."""

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import jax.numpy as jnp
import tyro

from e5v_jax.align.config import AlignConfig
from e5v_jax.checkpoints.converted import ConvertedFolder
from e5v_jax.dryrun.estimate import estimate_encode, estimate_train
from e5v_jax.dryrun.flops import count_forward, traced_flops, train_flops
from e5v_jax.dryrun.measure import measure
from e5v_jax.dryrun.program import (
    COLUMNS,
    Program,
    Target,
    align_program,
    assumed_rows,
    encode_program,
    per_device_bytes,
    train_program,
)
from e5v_jax.dryrun.report import Cost, Report
from e5v_jax.dryrun.topology import Topology, open_runtime, parse_topology
from e5v_jax.families import architecture_of, architectures
from e5v_jax.families.base import BatchShape, Family, ModelConfig
from e5v_jax.nn.layers import Precision
from e5v_jax.nn.quantized import Quantization
from e5v_jax.nn.remat import OFFLOADED
from e5v_jax.storage import as_path
from e5v_jax.train.config import MeshConfig, TrainConfig, check_values

IMAGE_PROMPT_TOKENS = 20
PROMPT_TOKENS = 32
"""More than any training prompt and template has around its sentence (21 with Llama-3)."""


@dataclass(frozen=True, kw_only=True)
class _Target:
    topology: str
    """Chips: v5e:4x8, v5p:2x2x4, v4:2x2x1, v6e:4x4, tpu7x:2x2x1; gpu:h100:8 (by formula); or cpu
    (of this machine)."""
    architecture: str | None = None
    """Architecture by name, where there is no model folder; by default told from the folder's
    config.json or name."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print JSON instead of a table: bytes, FLOPs, seconds."""


@dataclass(frozen=True, kw_only=True)
class TrainDryRun(_Target):
    """Compile the training step for a machine that is not here: does it fit, how fast can it be?

    No weights, no data and no accelerator are needed; for TPUs, libtpu is: pip install -e
    '.[tpu]'. The flags of training, --config among them, mean what they do there.
    """

    run: Annotated[TrainConfig, tyro.conf.arg(name="")]
    sequence_lengths: tuple[int, ...] = ()
    """Padded length of each group of a batch. By default one group of data.max_tokens + 32: no
    data pads to more."""


@dataclass(frozen=True, kw_only=True)
class AlignDryRun(_Target):
    """Compile the step of an alignment for a machine that is not here: does it fit, how fast can it
    be? For TPUs and this machine's CPU. The flags of alignment mean what they do there."""

    run: Annotated[AlignConfig, tyro.conf.arg(name="")]
    image_size: tuple[int, int] = (672, 672)
    """Height and width of each image, in pixels; the prompt has 20 tokens beside it."""
    captions: int = 5
    """Captions of an image, each of data.max_tokens tokens, where data.captions is all."""


@dataclass(frozen=True, kw_only=True)
class EncodeDryRun(_Target):
    """Compile the encoder for a machine that is not here: does it fit, how fast can it be?"""

    model: str
    """Model folder, or a name that says its architecture (e5-v)."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Precision of weights and arithmetic."""
    quantize: Quantization | None = None
    """Store the decoder's kernels as nf4 or int8_weight_only, or multiply in int8."""
    batch_size: int = 5
    """Inputs of one batch on each chip; 16,384 positions hold five of E5-V's square images."""
    image_size: tuple[int, int] = (672, 672)
    """Height and width of an input's image, in pixels; the prompt has 20 tokens beside it."""
    text_length: int | None = None
    """Instead of images, texts of so many positions, padding included."""
    mesh: MeshConfig = field(default_factory=lambda: MeshConfig(data=-1, fsdp=1))
    """Device mesh; by default whole weights on each chip."""


def find_architecture(folder: Path, name: str | None) -> tuple[str, tuple[Family, ModelConfig]]:
    """The architecture by name, of the folder, or in the folder's name. Raises ValueError: none."""
    if name is None and (folder / "config.json").is_file():
        base = ConvertedFolder(folder)
        return str(folder), (base.family, base.config)
    known, found = architectures(), name or architecture_of(folder.name)
    if found not in known:
        asked = f"--architecture {name}" if name else f"--model {folder}: no such folder"
        raise ValueError(f"{asked}; give --architecture, one of {', '.join(known)}")
    return found, known[found]


def report_train(args: TrainDryRun) -> Report:
    """Compile (for a GPU: estimate) one training step.

    Raises ImportError: no libtpu to compile for a TPU with; ValueError: one line naming the flag.
    """
    cfg, topology = args.run, parse_topology(args.topology)
    check_values(cfg)
    name, model = find_architecture(cfg.model, args.architecture)
    target = Target(*model, open_runtime(topology, cfg.mesh))
    lengths = step_lengths(args)
    program = train_program(cfg, target, lengths)
    estimate = estimate_step(cfg, target, program, lengths, topology)
    return step_report(cfg, name, target, topology, lengths, measure(program, topology, estimate))


def step_lengths(args: TrainDryRun) -> tuple[int, ...]:
    """The padded length of each group of a batch."""
    return args.sequence_lengths or (args.run.data.max_tokens + PROMPT_TOKENS,)


def _count_step(cfg: TrainConfig, target: Target, lengths: tuple[int, ...]) -> tuple[float, float]:
    """(useful, done) FLOPs of a training step, over all chips."""
    rows = COLUMNS * cfg.batch_size // len(lengths)
    useful = done = 0.0
    for length in lengths:
        if (together := assumed_rows(cfg)) is not None:
            length = together.row_length(length)
        forward = count_forward(
            target.family,
            target.config,
            rows=rows // cfg.texts_per_row,
            length=length,
            lora=cfg.lora,
        )
        count = partial(train_flops, forward, frozen_base=cfg.lora is not None)
        useful += count(remat="none", chunked=False)
        done += count(remat=cfg.remat, chunked=cfg.chunk_size is not None and cfg.chunk_size < rows)
    return useful, done


def estimate_step(
    cfg: TrainConfig,
    target: Target,
    program: Program,
    lengths: tuple[int, ...],
    topology: Topology,
) -> Cost:
    """What a training step costs by formula; of ``program`` only the sizes of its state count."""
    done = _count_step(cfg, target, lengths)[1]
    return estimate_train(cfg, target, program, lengths, done / topology.chips)


def step_report(
    cfg: TrainConfig,
    name: str,
    target: Target,
    topology: Topology,
    lengths: tuple[int, ...],
    cost: Cost,
) -> Report:
    """The report of a training step of the architecture called ``name`` that costs ``cost``."""
    inputs = COLUMNS * cfg.batch_size
    kind = "full" if cfg.lora is None else f"LoRA r {cfg.lora.rank}"
    base = f", {cfg.quantize} base" if cfg.quantize else ""
    chunk = f" in chunks of {cfg.chunk_size}" if cfg.chunk_size else ""
    return Report(
        program=f"training step ({kind}{base}, {cfg.batch_size} triplets{chunk})",
        architecture=name,
        topology=topology,
        cost=cost,
        useful_flops=_count_step(cfg, target, lengths)[0] / topology.chips,
        items=cfg.batch_size,
        item="triplets",
        tokens=sum(inputs // len(lengths) * length for length in lengths),
        remedies=_train_remedies(cfg, inputs, target.runtime.batch_devices),
    )


def report_align(args: AlignDryRun) -> Report:
    """Compile one step of an alignment.

    Raises ImportError: no libtpu to compile for a TPU with; ValueError: one line naming the flag.
    """
    cfg, topology = args.run, parse_topology(args.topology)
    check_values(cfg)
    if topology.platform == "gpu":
        raise ValueError("--topology: an alignment is compiled, not estimated: give TPUs or cpu")
    name, (family, config) = find_architecture(cfg.model, args.architecture)
    if not family.projector:
        raise ValueError(f"{name} has no projector of its own: there is nothing to align")
    target = Target(family, config, open_runtime(topology, cfg.mesh))
    labels = cfg.data.max_tokens * (args.captions if cfg.data.captions == "all" else 1)
    length, shape_key = family.image_shape(config, args.image_size, IMAGE_PROMPT_TOKENS + labels)
    shape = BatchShape(cfg.batch_size, length, shape_key)
    program = align_program(cfg, target, shape, labels)
    plain = align_program(replace(cfg, remat="none", chunk_size=None), target, shape, labels)
    useful = traced_flops(plain.trace().jaxpr) / topology.chips
    parameters, optimizer = (
        per_device_bytes(tree) for tree in ((program.frozen, program.trainable), program.optimizer)
    )
    known = Cost(parameters, optimizer, parameters + optimizer, 0, useful, 0.0)
    what = cfg.train if cfg.lora is None else f"projector and LoRA r {cfg.lora.rank}"
    base = f", {cfg.quantize} base" if cfg.quantize else ""
    remedies = [] if cfg.remat == "full" else ["--remat full"]
    if (half := (cfg.chunk_size or cfg.batch_size) // 2) >= target.runtime.batch_devices:
        remedies.append(f"--chunk-size {half}")
    return Report(
        program=f"alignment step ({what}{base}, {cfg.batch_size} images, {labels} labels each)",
        architecture=name,
        topology=topology,
        cost=measure(program, topology, known),
        useful_flops=useful,
        items=cfg.batch_size,
        item="images",
        tokens=shape.rows * length,
        remedies=(*remedies, "more chips, with --mesh.fsdp -1"),
    )


def report_encode(args: EncodeDryRun) -> Report:
    """Compile (for a GPU: estimate) one batch of the encoder.

    Raises ImportError: no libtpu to compile for a TPU with; ValueError: one line naming the flag.
    """
    topology = parse_topology(args.topology)
    name, model = find_architecture(as_path(args.model), args.architecture)
    length, shape_key = args.text_length or 0, 0
    if args.text_length is None:
        if "image" not in model[1].modalities:
            raise ValueError(f"{name} is a text-only model: give --text-length")
        length, shape_key = model[0].image_shape(model[1], args.image_size, IMAGE_PROMPT_TOKENS)
    target = Target(*model, open_runtime(topology, args.mesh))
    rows = args.batch_size * target.runtime.batch_devices
    shape, dtype = BatchShape(rows, length, shape_key), jnp.dtype(args.dtype)
    program = encode_program(target, shape, Precision(dtype, dtype, args.quantize))
    forward = count_forward(
        *model, rows=rows, length=length, shape_key=shape_key, causal_half=True, pooled_only=True
    )
    flops = forward.forward / topology.chips
    int8 = (forward.decoder + forward.vision) / topology.chips if args.quantize == "int8" else 0.0
    estimate = estimate_encode(target, program, shape, flops, dtype.itemsize, int8_flops=int8)
    item = "images" if shape_key else "texts"
    remedies = [f"--batch-size {args.batch_size // 2}"] if args.batch_size > 1 else []
    if args.quantize != "nf4":
        remedies.append("--quantize int8" if args.quantize is None else "--quantize nf4")
    return Report(
        program=f"encoding ({args.quantize or args.dtype}, {rows} {item} of {length})",
        architecture=name,
        topology=topology,
        cost=measure(program, topology, estimate),
        useful_flops=flops,
        items=rows,
        item=item,
        tokens=rows * length,
        remedies=(*remedies, "--mesh.data 1 --mesh.fsdp -1 on more chips"),
    )


def _train_remedies(cfg: TrainConfig, inputs: int, devices: int) -> tuple[str, ...]:
    """What to try, the cheapest in time first; a chunk has some 4096 positions of 64 a device."""
    remedies = [] if cfg.remat in ("full", *OFFLOADED) else ["--remat full"]
    most = (cfg.chunk_size or inputs) // 2
    least = devices * cfg.texts_per_row
    chunks = [n for n in range(least, most + 1, least) if inputs % n == 0]
    if chunks and chunks[-1] >= 16 * devices:
        instead = "--remat full " if cfg.remat in OFFLOADED else ""
        remedies.append(f"{instead}--chunk-size {max(n for n in chunks if n <= 64 * devices)}")
    if cfg.lora is None:
        remedies.append("LoRA instead of full training")
    elif cfg.quantize is None:
        remedies.append("--quantize nf4")
    return (*remedies, "more chips, with --mesh.fsdp -1")
