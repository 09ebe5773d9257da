"""The fastest way to run a training step on some chips: mesh, chunks, what backward passes keep.

Every plan is ranked by formula (dryrun/estimate.py); for TPUs the best few are compiled.
"""

import itertools
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import get_args

from e5v_jax.checkpoints.converted import ConvertedFolder
from e5v_jax.dryrun.lengths import data_lengths
from e5v_jax.dryrun.measure import measure
from e5v_jax.dryrun.program import COLUMNS, Target, train_program
from e5v_jax.dryrun.report import Cost, Report, gib
from e5v_jax.dryrun.run import (
    TrainDryRun,
    estimate_step,
    find_architecture,
    step_lengths,
    step_report,
)
from e5v_jax.dryrun.topology import Topology, open_runtime, parse_topology
from e5v_jax.families.base import Family, ModelConfig
from e5v_jax.nn.quantized import Quantization
from e5v_jax.nn.remat import OFFLOADED, Remat
from e5v_jax.runtime import Runtime
from e5v_jax.storage import as_path
from e5v_jax.train.config import MeshConfig, TrainConfig

_OPTIMISM = 0.85  # of the memory by formula, which errs to both sides, a plan may still need less
_CHUNKS = tuple(2**power for power in range(2, 10))  # sentences of a chunk on each chip


@dataclass(frozen=True, kw_only=True)
class PlanDryRun(TrainDryRun):
    """Search for the fastest plan of the training step that fits: mesh, chunk size, remat.

    They are ranked by formula; for TPUs the best few are compiled. All else is as in training.
    Where --model is a folder and --data.path is there, the lengths are those of the data, and how
    many groups of them a batch runs in is part of the plan.
    """

    compiles: int = 3
    """So many plans that fit are compiled; and at most twice as many."""
    quantizations: tuple[Quantization | None, ...] = ()
    """Kinds of a frozen base to try, which do not compute the same; none tries the one given."""


@dataclass(frozen=True)
class Plan:
    """What is free to choose in a training step, and what a step then costs."""

    run: TrainConfig
    report: Report
    lengths: tuple[int, ...]  # padded, of each group of a batch
    chooses_groups: bool  # how many of them there are is part of it

    @property
    def flags(self) -> str:
        """For python -m e5v_jax.train."""
        run, mesh = self.run, self.run.mesh
        words = ["--mesh.data", mesh.data, "--mesh.fsdp", mesh.fsdp, "--mesh.tensor", mesh.tensor]
        words += ["--chunk-size", run.chunk_size, "--remat", run.remat]
        words += ["--data.length-groups", len(self.lengths)] if self.chooses_groups else []
        words += [] if run.quantize is None else ["--quantize", run.quantize]
        return shlex.join(map(str, words))

    @property
    def seconds(self) -> float:
        """A step's, at best."""
        return self.report.step_seconds or 0.0

    @property
    def fullness(self) -> float:
        """How much of a chip's memory, or the host's, it may need at least; above 1 is too much."""
        chip, cost = self.report.topology.chip, self.report.cost
        assert chip is not None  # there is nothing to plan by for this machine's CPU
        hbm, host = _OPTIMISM * cost.peak / chip.usable_hbm, cost.host_memory / chip.host_memory
        return max(hbm, host)

    def to_json(self) -> dict[str, object]:
        """The flags, and the report of :meth:`Report.to_json`."""
        return {"flags": self.flags, "lengths": self.lengths, **self.report.to_json()}


@dataclass(frozen=True)
class Plans:
    """Those that were compiled (of GPUs: the best), the fastest that fits first, and the others."""

    tried: list[Plan]
    slower: list[Plan]  # by formula
    too_large: list[Plan]  # by formula, the smallest first

    @property
    def best(self) -> Plan | None:
        """The fastest that fits."""
        return next((plan for plan in self.tried if plan.report.fits), None)

    def to_json(self) -> dict[str, object]:
        """The plans that were tried, and how many were not."""
        rest = {"slower": len(self.slower), "too_large": len(self.too_large)}
        return {"plans": [plan.to_json() for plan in self.tried], **rest}

    def print(self) -> None:
        """Show the flags of the best, the runners-up, and why the rest lost."""
        if self.best is None:
            print("nothing fits")
        else:
            print(f"{self.best.flags}\n")
        for plan in self.tried:
            report = plan.report
            print(
                f"{1e3 * plan.seconds:10.1f} ms  {gib(report.cost.peak):>10}  {report.bound:12} "
                f"{report.cost.method:9}  {plan.flags}{'' if report.fits else '  does not fit'}"
            )
        if self.slower:
            nearest = self.slower[0]
            print(
                f"{len(self.slower)} more are slower by formula; the nearest: "
                f"{1e3 * nearest.seconds:.1f} ms, bound by {nearest.report.bound}, {nearest.flags}"
            )
        if self.too_large:
            nearest = self.too_large[0]
            print(
                f"{len(self.too_large)} more do not fit by formula; the nearest: "
                f"{100 * nearest.fullness:.0f} % of what there is, {nearest.flags}"
            )


def search_plans(args: PlanDryRun) -> Plans:
    """Rank all plans for chips that are not here, and compile the best.

    Raises ImportError: no libtpu to compile for a TPU with; ValueError: one line naming the flag.
    """
    topology = parse_topology(args.topology)
    run = args.run
    name, model = find_architecture(run.model, args.architecture)
    lengths = [step_lengths(args)]
    is_there = run.data.path and all(as_path(path).exists() for path in run.data.path)
    if not args.sequence_lengths and is_there and (run.model / "config.json").is_file():
        lengths = data_lengths(run, ConvertedFolder(run.model), topology.chips)
    return find_plans(
        run,
        Place(topology, name, *model, lengths, partial(open_runtime, topology)),
        quantizations=args.quantizations or (run.quantize,),
        compiles=args.compiles,
    )


@dataclass(frozen=True)
class Place:
    """What is given of a step: where it runs, and what."""

    topology: Topology
    architecture: str
    family: Family
    config: ModelConfig
    lengths: Sequence[tuple[int, ...]]  # padded, of each group of a batch, for each number of them
    open_runtime: Callable[[MeshConfig], Runtime]  # to compile for

    @property
    def chooses_groups(self) -> bool:
        """Whether plans may differ in how many groups of similar length a batch runs in."""
        return len(self.lengths) > 1

    def plan(self, run: TrainConfig, target: Target, lengths: tuple[int, ...], cost: Cost) -> Plan:
        """The plan of a step on groups of ``lengths`` that costs so much."""
        report = step_report(run, self.architecture, target, self.topology, lengths, cost)
        return Plan(run, report, lengths, self.chooses_groups)


def find_plans(
    run: TrainConfig,
    place: Place,
    *,
    quantizations: Sequence[Quantization | None],
    compiles: int,
    on_plan: Callable[[Plan], None] = lambda plan: None,
) -> Plans:
    """Rank all plans of a step, compile the best; ``on_plan`` hears of each that is compiled.

    Raises ImportError, ValueError: as :func:`search_plans`.
    """
    chip = place.topology.chip
    if chip is None:
        raise ValueError("there are no figures to plan by for this machine's CPU: name the chips")
    ranked = list(_rank(run, place, quantizations))
    if not ranked:
        raise ValueError(
            f"--batch-size: {run.batch_size} triplets split over no mesh of {place.topology.name}"
        )
    fit = [plan for plan in ranked if plan.fullness <= 1]
    # of equal ones, that of which the other limits leave more room
    fit.sort(key=lambda plan: (plan.seconds, sum(plan.report.seconds.values())))
    too_large = [plan for plan in ranked if plan.fullness > 1]
    too_large.sort(key=lambda plan: plan.fullness)
    tried: list[Plan] = []
    while fit and len(tried) < 2 * compiles:
        if sum(plan.report.fits for plan in tried) == compiles:
            break
        tried.append(_compile(fit.pop(0), place))
        on_plan(tried[-1])
    tried.sort(key=lambda plan: (not plan.report.fits, plan.seconds))
    return Plans(tried, fit, too_large)


def _rank(
    run: TrainConfig, place: Place, quantizations: Sequence[Quantization | None]
) -> Iterator[Plan]:
    """Yield every plan that divides, with its cost by formula."""
    topology = place.topology
    reaches_host = topology.chip is not None and topology.chip.host_bandwidth is not None
    for mesh, quantize, lengths in itertools.product(
        _meshes(topology.chips, place.config.text.num_key_value_heads),
        quantizations,
        place.lengths,
    ):
        rows, data = COLUMNS * run.batch_size // len(lengths), run.data
        if place.chooses_groups:
            data = replace(data, length_groups=len(lengths))
        whole = replace(run, mesh=mesh, quantize=quantize, chunk_size=None, data=data)
        runtime = open_runtime(topology, mesh, compiles=False)
        target = Target(place.family, place.config, runtime)
        try:
            program = train_program(whole, target, lengths)  # for the sizes of its state
        except ValueError:
            continue  # the batch does not divide over this mesh
        devices = runtime.batch_devices
        per_chip = [n for n in _CHUNKS if n % run.texts_per_row == 0]
        chunks = [n * devices for n in per_chip if rows % (n * devices) == 0]
        for chunk in (None, *(n for n in chunks if n < rows)):
            for remat in get_args(Remat):
                if remat in OFFLOADED and (chunk or not reaches_host):
                    continue
                cfg = replace(whole, chunk_size=chunk, remat=remat)
                cost = estimate_step(cfg, target, program, lengths, topology)
                yield place.plan(cfg, target, lengths, cost)


def _meshes(chips: int, heads: int) -> Iterator[MeshConfig]:
    """Yield all meshes of so many chips of which ``tensor`` divides the key/value heads."""
    for tensor in range(1, min(chips, heads) + 1):
        if heads % tensor or chips % tensor:
            continue
        for fsdp in range(1, chips // tensor + 1):
            if chips // tensor % fsdp == 0:
                yield MeshConfig(data=chips // tensor // fsdp, fsdp=fsdp, tensor=tensor)


def _compile(plan: Plan, place: Place) -> Plan:
    """The same plan with what XLA makes of it; of a GPU's, as it is."""
    if place.topology.platform == "gpu":
        return plan
    target = Target(place.family, place.config, place.open_runtime(plan.run.mesh))
    program = train_program(plan.run, target, plan.lengths)
    cost = measure(program, place.topology, plan.report.cost)
    return place.plan(plan.run, target, plan.lengths, cost)
