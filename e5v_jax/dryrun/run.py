"""The dry run of training and of encoding, from their flags to a report."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from jax.sharding import AbstractMesh, AxisType, Mesh

from e5v_jax.checkpoints.converted import ConvertedFolder
from e5v_jax.dryrun.estimate import estimate_encode, estimate_train
from e5v_jax.dryrun.flops import count_forward, train_flops
from e5v_jax.dryrun.measure import measure
from e5v_jax.dryrun.program import COLUMNS, encode_program, train_program
from e5v_jax.dryrun.report import Report
from e5v_jax.dryrun.topology import Topology, compile_devices, parse_topology
from e5v_jax.families.llava_next.presets import ARCHITECTURES, architecture_of
from e5v_jax.nn.config import ModelConfig
from e5v_jax.nn.quantized import Quantization
from e5v_jax.sharding import MESH_AXES, make_mesh
from e5v_jax.storage import as_path
from e5v_jax.train.config import MeshConfig, TrainConfig

PROMPT_TOKENS = 32
"""More than any training prompt and template has around its sentence (21 with Llama-3)."""


@dataclass(frozen=True)
class TrainDryRun(TrainConfig):
    """Compile the training step for a machine that is not here: does it fit, how fast can it be?

    No weights, no data and no accelerator are needed; for TPUs, libtpu is: pip install -e
    '.[tpu]'. The flags of training mean what they do there.
    """

    topology: str = ""
    """Chips: v5e:4x8, v5p:2x2x4, v4:2x2x1, v6e:4x4, tpu7x:2x2x1; gpu:h100:8 (by formula); or cpu
    (of this machine)."""
    architecture: str | None = None
    """Architecture by name, where there is no model folder; by default told from the folder's
    config.json or name."""
    sequence_lengths: tuple[int, ...] = ()
    """Padded length of each group of a batch. By default one group of data.max_tokens + 32: no
    data pads to more."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print JSON instead of a table: bytes, FLOPs, seconds."""


@dataclass(frozen=True)
class EncodeDryRun:
    """Compile the encoder for a machine that is not here: does it fit, how fast can it be?"""

    model: str
    """Model folder, or a name that says its architecture (e5-v)."""
    topology: str
    """Chips: v5e:1x1, v5p:2x2x1, ...; gpu:h100:8 (by formula); or cpu (of this machine)."""
    architecture: str | None = None
    """Architecture by name, where there is no model folder."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Precision of weights and arithmetic."""
    quantize: Quantization | None = None
    """Store the decoder's kernels as int8 or nf4."""
    batch_size: int = 5
    """Inputs of one batch on each chip; 16,384 positions hold five images of 3,072."""
    length: int = 3072
    """Padded positions of an input; a square image is 2,948 tokens with its prompt, which pad to
    3,072, a 640x480 one 2,360 in 2,432."""
    tiles: int = 5
    """Image tiles of an input; 0 for texts."""
    mesh: MeshConfig = field(default_factory=lambda: MeshConfig(data=-1, fsdp=1))
    """Device mesh; by default whole weights on each chip."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print JSON instead of a table: bytes, FLOPs, seconds."""


def dry_run_train(args: TrainDryRun) -> None:
    """Report on the training step that ``args`` describe."""
    show(report_train(args), as_json=args.json)


def dry_run_encode(args: EncodeDryRun) -> None:
    """Report on one batch of the encoder that ``args`` describe."""
    show(report_encode(args), as_json=args.json)


def show(report: Report, *, as_json: bool) -> None:
    """Print a report."""
    if as_json:
        print(json.dumps(report.to_json(), indent=1))
    else:
        report.print()


def find_architecture(folder: Path, name: str | None) -> tuple[str, ModelConfig]:
    """The architecture by name, or that of the folder, or the one that the folder's name says.

    Raises:
        ValueError: none of them.
    """
    if name is None and (folder / "config.json").is_file():
        return str(folder), ConvertedFolder(folder).config
    known = name or architecture_of(folder.name)
    if known not in ARCHITECTURES:
        found = f"--architecture {name}" if name else f"--model {folder}: no such folder"
        raise ValueError(f"{found}; give --architecture, one of {', '.join(ARCHITECTURES)}")
    return known, ARCHITECTURES[known]


def _mesh(cfg: MeshConfig, topology: Topology) -> Mesh:
    """Devices to compile for; for a GPU, which nothing here compiles for, only their number."""
    if topology.chip is not None and not topology.is_tpu:
        sizes = [cfg.data, cfg.fsdp, cfg.tensor]
        if -1 in sizes:
            known = abs(sizes[0] * sizes[1] * sizes[2])
            sizes[sizes.index(-1)] = max(topology.chips // known, 1)
        if sizes[0] * sizes[1] * sizes[2] != topology.chips:
            raise ValueError(f"mesh {sizes} does not fit {topology.chips} GPUs")
        # as good as a Mesh to NamedSharding
        mesh: Any = AbstractMesh(tuple(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * 3)
        return mesh
    return make_mesh(cfg.data, cfg.fsdp, cfg.tensor, devices=compile_devices(topology))


def report_train(args: TrainDryRun) -> Report:
    """Compile (for a GPU: estimate) one training step.

    Raises:
        ImportError: no libtpu to compile for a TPU with.
        ValueError: one line naming the flag.
    """
    if not args.topology:
        raise ValueError("--dry-run needs --topology, such as v5e:4x8, gpu:h100:8 or cpu")
    if args.quantize is not None and args.lora is None:
        raise ValueError("quantize: a quantised base is frozen, so it needs lora to train anything")
    topology = parse_topology(args.topology)
    name, model = find_architecture(args.model, args.architecture)
    mesh = _mesh(args.mesh, topology)
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    lengths = args.sequence_lengths or (args.data.max_tokens + PROMPT_TOKENS,)
    program = train_program(args, model, mesh, lengths)
    inputs = COLUMNS * args.batch_size
    rows = inputs // len(lengths)
    forwards = [count_forward(model, rows=rows, length=n, lora=args.lora) for n in lengths]
    by_hand: dict[str, Any] = {"frozen_base": args.lora is not None}
    useful = sum(train_flops(f, remat="none", chunked=False, **by_hand) for f in forwards)
    chunked = args.chunk_size is not None and args.chunk_size < rows
    done = sum(train_flops(f, remat=args.remat, chunked=chunked, **by_hand) for f in forwards)
    kind = "full" if args.lora is None else f"LoRA r {args.lora.rank}"
    base = f", {args.quantize} base" if args.quantize else ""
    chunk = f" in chunks of {args.chunk_size}" if args.chunk_size else ""
    measured = measure(
        program,
        topology,
        lambda: estimate_train(
            args, model, program, lengths, devices=devices, split=mesh.shape["fsdp"]
        ),
        done,
    )
    return Report(
        program=f"training step ({kind}{base}, {args.batch_size} triplets{chunk})",
        architecture=name,
        topology=topology,
        items=args.batch_size,
        item="triplets",
        tokens=sum(rows * n for n in lengths),
        remedies=_train_remedies(args, inputs, devices),
        **measured.as_fields(useful / topology.chips),
    )


def report_encode(args: EncodeDryRun) -> Report:
    """Compile (for a GPU: estimate) one batch of the encoder.

    Raises:
        ImportError: no libtpu to compile for a TPU with.
        ValueError: one line naming the flag.
    """
    topology = parse_topology(args.topology)
    name, model = find_architecture(as_path(args.model), args.architecture)
    mesh = _mesh(args.mesh, topology)
    rows = args.batch_size * mesh.shape["data"] * mesh.shape["fsdp"]
    program = encode_program(
        model,
        mesh,
        dtype=args.dtype,
        quantization=args.quantize,
        rows=rows,
        length=args.length,
        tiles_per_image=args.tiles,
    )
    forward = count_forward(
        model,
        rows=rows,
        length=args.length,
        tiles=rows * args.tiles,
        causal_half=True,
        pooled_only=True,
    ).forward
    measured = measure(
        program,
        topology,
        lambda: estimate_encode(
            model,
            program,
            rows=args.batch_size,
            length=args.length,
            tiles=args.batch_size * args.tiles,
            size=2 if args.dtype == "bfloat16" else 4,
        ),
        forward,
    )
    item = "images" if args.tiles else "texts"
    remedies = [f"--batch-size {args.batch_size // 2}"] if args.batch_size > 1 else []
    if args.quantize != "nf4":
        remedies.append("--quantize int8" if args.quantize is None else "--quantize nf4")
    remedies.append("--mesh.data 1 --mesh.fsdp -1 on more chips")
    return Report(
        program=f"encoding ({args.quantize or args.dtype}, {rows} {item} of {args.length})",
        architecture=name,
        topology=topology,
        items=rows,
        item=item,
        tokens=rows * args.length,
        remedies=tuple(remedies),
        **measured.as_fields(forward / topology.chips),
    )


def _train_remedies(cfg: TrainConfig, inputs: int, devices: int) -> tuple[str, ...]:
    """What to try, the cheapest in time first."""
    remedies = []
    if cfg.remat != "full":
        remedies.append("--remat full")
    smaller = (cfg.chunk_size or inputs) // 2
    chunk = next((n for n in range(smaller, 0, -1) if inputs % n == 0 == n % devices), None)
    if chunk is not None and chunk // devices >= 16:
        remedies.append(f"--chunk-size {_rounder(chunk, inputs, devices)}")
    if cfg.lora is None:
        remedies.append("LoRA instead of full training")
    elif cfg.quantize is None:
        remedies.append("--quantize nf4")
    remedies.append("more chips, with --mesh.fsdp -1")
    return tuple(remedies)


def _rounder(chunk: int, inputs: int, devices: int) -> int:
    """A divisor of ``inputs`` that puts some 4096 positions of 64 on a device, or ``chunk``."""
    target = min(chunk, 64 * devices)
    return next(
        (n for n in range(target, devices - 1, -1) if inputs % n == 0 == n % devices), chunk
    )


def as_dry_run(cfg: TrainConfig) -> TrainDryRun:
    """The defaults of the dry run's flags: those of the run."""
    fields = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(cfg)}
    return TrainDryRun(**fields)
