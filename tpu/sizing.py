"""``python tpu/sizing.py``, in the checkout: the tables of tpu/README.md, from dry runs.

Each dry run takes a minute or two, so results are kept in a file, and what is in there is not run
again: delete it (or a line of it) to do so.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from e5v_jax import cli
from e5v_jax.dryrun.chips import TPUS

Record = dict[str, Any]
_SMALLEST_FIRST = {
    "v5e": ("1x1", "2x2", "2x4", "4x4"),
    "v6e": ("1x1", "2x2", "2x4"),
    "v4": ("2x2x1", "2x2x2"),
    "v5p": ("2x2x1", "2x2x2"),
}
_PODS = ("2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
# (data, fsdp, tensor) and remat of the best by ``python -m e5v_jax.dryrun plan``
_PLANS: dict[str, tuple[tuple[int, int, int], Any]] = {
    "2x4": ((4, 2, 1), "offload_dots_except_mlp"),
    "4x8": ((1, 32, 1), "dots"),
    "8x8": ((4, 8, 2), "dots"),
    "8x16": ((64, 1, 2), "dots"),
    "16x16": ((128, 1, 2), "dots"),
}
_MARK = "<!-- {end}tables of python tpu/sizing.py -->"


@dataclass(frozen=True)
class Args:
    """Write the sizing and scaling tables into the README of the launch files."""

    readme: Path = Path("tpu/README.md")
    """File with the tables between two comments."""
    results: Path = Path("tpu/sizing.jsonl")
    """Dry runs done so far, one JSON object a line; more are added."""
    only_tables: bool = False
    """Run nothing, only write the tables from the results there are."""


def main(args: Args) -> None:
    """Do the dry runs that are missing, then write the tables.

    Raises:
        ValueError: the README lacks the two comments.
    """
    text = args.readme.read_text()
    before, begin, rest = text.partition(_MARK.format(end=""))
    _, end, after = rest.partition(_MARK.format(end="end of "))
    if not end:
        raise ValueError(f"{args.readme}: no pair of comments {_MARK.format(end='')!r}")
    done = _Results(args.results, may_run=not args.only_tables)
    tables = "\n\n".join([sizing_table(done), scaling_table(done), backbones_table(done)])
    args.readme.write_text(f"{before}{begin}\n\n{tables}\n\n{end}{after}")
    print(f"{args.readme}: tables written")


class _Results:
    """Dry runs by their names, in a file that grows."""

    def __init__(self, file: Path, *, may_run: bool) -> None:
        lines = file.read_text().splitlines() if file.exists() else []
        self._records: dict[str, Record] = {r["name"]: r for r in map(json.loads, lines)}
        self._file, self._may_run = file, may_run

    def get(self, name: str, run: Callable[[], Any]) -> Record | None:
        """The record of that name; made by ``run``, which returns a Report, if there is none."""
        if name not in self._records and self._may_run:
            print(name, flush=True)
            self._records[name] = {"name": name, **run().to_json()}
            with self._file.open("a") as file:
                file.write(json.dumps(self._records[name]) + "\n")
        return self._records.get(name)


def _train(topology: str, **changes: Any) -> Any:
    from e5v_jax.dryrun.run import TrainDryRun, report_train  # loads JAX, which --help need not
    from e5v_jax.nn.layers import LoRAConfig
    from e5v_jax.train.config import TrainConfig

    # the paper's, without dropout: that adds no matmul, but time to compile
    lora = LoRAConfig(rank=64, alpha=16.0)
    cfg = TrainConfig(Path("e5v-llama3-8b"), Path(), lora=lora, **changes)
    return report_train(TrainDryRun(run=cfg, topology=topology))


def _encode(topology: str, quantize: Any, fsdp: bool) -> Any:
    from e5v_jax.dryrun.run import EncodeDryRun, report_encode
    from e5v_jax.train.config import MeshConfig

    args = EncodeDryRun(model="e5-v", topology=topology, quantize=quantize)
    if fsdp:
        args = dataclasses.replace(args, mesh=MeshConfig())
    return report_encode(args)


def _chunk(chips: int) -> int:
    """64 sentences on a chip at a time, or the next fewer that divide the step's 2304."""
    return next(n * chips for n in range(64, 0, -1) if 2304 % (n * chips) == 0)


def _chips(sides: str) -> int:
    total = 1
    for side in sides.split("x"):
        total *= int(side)
    return total


def _workloads() -> Iterator[tuple[str, str, Callable[[str, str], Any]]]:
    """(what, its flags, how to dry-run it on a slice)."""

    def lora(chip: str, sides: str) -> Any:
        return _train(f"{chip}:{sides}", chunk_size=_chunk(_chips(sides)))

    def qlora(chip: str, sides: str) -> Any:
        chunk_size = _chunk(_chips(sides))
        return _train(f"{chip}:{sides}", chunk_size=chunk_size, quantize="nf4")

    def qlora_rows(chip: str, sides: str) -> Any:
        how: dict[str, Any] = {"quantize": "nf4", "remat": "dots", "texts_per_row": 4}
        return _train(f"{chip}:{sides}", chunk_size=32 * _chips(sides), **how)

    def bf16(chip: str, sides: str) -> Any:
        whole = chip != "v5e"  # 15 GB of weights do not fit one of its chips
        return _encode(f"{chip}:{sides}", None, fsdp=not whole)

    def int8(chip: str, sides: str) -> Any:
        return _encode(f"{chip}:{sides}", "int8", fsdp=False)

    yield "LoRA, bf16 base", "64 sentences a chip at a time", lora
    yield "QLoRA, NF4 base", "64 sentences a chip at a time", qlora
    yield "QLoRA, NF4 base, remat dots, 4 texts a row", "32 sentences a chip at a time", qlora_rows
    yield "encode, bf16", "5 square images a chip", bf16
    yield "encode, int8", "5 square images a chip", int8


def sizing_table(done: _Results) -> str:
    """The smallest slice of each chip that each workload fits, as Markdown."""
    lines = [
        "| workload (Llama-3-8B) | slice | peak / HBM, GiB a chip | step at best | bound by "
        "| per s and slice |",
        "|---|---|---|---|---|---|",
    ]
    for what, how, run in _workloads():
        for chip, slices in _SMALLEST_FIRST.items():
            for sides in slices:
                if chip == "v5e" and sides == "1x1" and "bf16" in what:
                    continue  # the weights alone are 14.6 GiB
                record = done.get(f"{what} {chip}:{sides}", partial(run, chip, sides))
                if record is None or not record["fits"]:
                    continue
                peak, capacity = (x / 2**30 for x in (record["memory"]["peak"], record["capacity"]))
                lines.append(
                    f"| {what}, {how} | {chip}:{sides} | {peak:.1f} / {capacity:.1f} "
                    f"| {record['step_seconds']:.2f} s | {record['bound']} "
                    f"| {record['items_per_step'] / record['step_seconds']:.0f} {record['item']} |"
                )
                break
    return "\n".join(lines)


def scaling_table(done: _Results) -> str:
    """The paper's step of 768 triplets on more and more v5e chips, as Markdown."""
    lines = [
        "| chips | slice | data, fsdp, tensor, remat | peak, GiB | compute, ms | memory, ms "
        "| interconnect, ms | host, ms | overlapped, ms (efficiency) "
        "| one after another, ms (efficiency) | run of 718 steps |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for sides, record, how in _scaled(done):
        chips = _chips(sides)
        limits = ("compute", "memory", "interconnect", "host")
        parts = [1e3 * record["seconds"].get(name, 0.0) for name in limits]
        best, worst = max(parts), sum(parts)
        useful = 1e3 * record["useful_flops"] / TPUS["v5e"].flops
        shares = [100 * useful / time for time in (best, worst)]
        lines.append(
            f"| {chips} | {sides} | {how} | {record['memory']['peak'] / 2**30:.1f}"
            f"{'' if record['fits'] else ': does not fit'} | "
            + " | ".join(f"{x:.0f}" for x in parts)
            + f" | {best:.0f} ({shares[0]:.0f} %) | {worst:.0f} ({shares[1]:.0f} %) "
            f"| {718 * best / 6e4:.1f} to {718 * worst / 6e4:.1f} min |"
        )
    return "\n".join(lines)


def _scaled(done: _Results) -> Iterator[tuple[str, Record, str]]:
    """(slice, dry run, mesh and remat): of the recipe as it is, then of the planner's best."""
    from e5v_jax.train.config import MeshConfig

    for sides in _PODS:
        chips = _chips(sides)
        chunk = {"chunk_size": _chunk(chips)} if chips <= 8 else {}  # else it fits without
        record = done.get(f"scaling v5e:{sides}", partial(_train, f"v5e:{sides}", **chunk))
        if record is not None:
            yield sides, record, f"1, {chips}, 1, full"
    for sides, (mesh, remat) in _PLANS.items():
        run = partial(_train, f"v5e:{sides}", mesh=MeshConfig(*mesh), remat=remat)
        record = done.get(f"planned v5e:{sides}", run)
        if record is not None:
            yield sides, record, f"{', '.join(map(str, mesh))}, {remat}"


_RECIPES = {
    "qwen3-vl-2b": "e5v_qwen3_vl_2b",
    "qwen3-vl-8b": "e5v_qwen3_vl_8b",
    "qwen2.5-vl-7b": "lco_qwen2_5_vl_7b",
}
_PHOTOGRAPHED = (*_RECIPES, "llava-next-llama3-8b")
_SLICES = ("v5e:1x1", "v5e:2x2", "v6e:1x1", "v5p:2x2x1", "gpu:h100:1")
PHOTOGRAPH = (375, 500)  # pixels (height, width), as most of Flickr's


def _recipe(architecture: str, topology: str) -> Any:
    """The step of a configuration file, its chunk as large as 64 sentences a chip."""
    from e5v_jax.cli import read_config
    from e5v_jax.dryrun.run import TrainDryRun, report_train
    from e5v_jax.train.config import TrainConfig

    file = Path(__file__).parents[1] / "configs" / f"{_RECIPES[architecture]}.py"
    cfg = read_config(file, TrainConfig)
    assert cfg.lora is not None
    sides = topology.split(":")[1]
    chips = 1 if topology.startswith("gpu") else _chips(sides)
    lora = dataclasses.replace(cfg.lora, dropout=0.0)  # as above
    cfg = dataclasses.replace(cfg, lora=lora, chunk_size=_chunk(chips))
    return report_train(
        TrainDryRun(run=cfg, topology=topology, architecture=architecture, sequence_lengths=(64,))
    )


def _photographs(architecture: str, topology: str, quantize: Any) -> Any:
    from e5v_jax.dryrun.run import EncodeDryRun, report_encode
    from e5v_jax.train.config import MeshConfig

    args = EncodeDryRun(
        model="none",
        architecture=architecture,
        topology=topology,
        quantize=quantize,
        image_size=PHOTOGRAPH,
        batch_size=5 if architecture.startswith("llava") else 32,
    )
    if topology == "v5e:2x2" and not architecture.endswith("2b"):  # no chip holds the weights
        args = dataclasses.replace(args, mesh=MeshConfig())
    return report_encode(args)


def backbones_table(done: _Results) -> str:
    """Text-only recipes and photographs of 500x375 with each backbone, as Markdown."""
    lines = [
        "| backbone | what | slice | peak / HBM, GiB a chip | step at best | bound by "
        "| per s and slice | 718 steps |",
        "|---|---|---|---|---|---|---|---|",
    ]

    def add(backbone: str, what: str, topology: str, run: Callable[[], Any]) -> None:
        record = done.get(f"{backbone} {what} {topology}", run)
        if record is None:
            return
        peak, capacity = (x / 2**30 for x in (record["memory"]["peak"], record["capacity"]))
        memory = f"{peak:.1f} / {capacity:.1f}{'' if record['fits'] else ': does not fit'}"
        best = record["step_seconds"]
        hours = f"{718 * best / 3600:.1f} h" if record["item"] == "triplets" else ""
        lines.append(
            f"| {backbone} | {what} | {topology} | {memory} | {best:.2f} s | {record['bound']} "
            f"| {record['items_per_step'] / best:.0f} {record['item']} | {hours} |"
        )

    for backbone in _PHOTOGRAPHED:
        for topology in _SLICES:
            quantize = "int8" if topology == "v5e:1x1" and backbone != "qwen3-vl-2b" else None
            what = f"photographs, {quantize or 'bf16'}"
            add(backbone, what, topology, partial(_photographs, backbone, topology, quantize))
    for backbone, config in _RECIPES.items():
        for topology in _SLICES:
            add(backbone, f"{config}.py", topology, partial(_recipe, backbone, topology))
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main, Args)
