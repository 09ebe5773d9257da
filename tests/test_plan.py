"""The search for a plan: what it tries, what it finds, and that a run follows it."""

import dataclasses
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest
import tyro
from training_runs import config, make_folder, read_metrics

from e5v_jax.checkpoints.converted import ConvertedFolder
from e5v_jax.dryrun import here, plan
from e5v_jax.dryrun.__main__ import main
from e5v_jax.dryrun.plan import Plan, PlanDryRun, search_plans
from e5v_jax.dryrun.topology import parse_topology
from e5v_jax.nn.layers import LoRAConfig
from e5v_jax.nn.remat import OFFLOADED
from e5v_jax.train.__main__ import start
from e5v_jax.train.batches import tokenize_pairs
from e5v_jax.train.command import TrainCommand
from e5v_jax.train.config import TrainConfig
from e5v_jax.train.feed import load_data
from e5v_jax.train.setup import open_base

pytestmark = pytest.mark.optimized

LORA = LoRAConfig(rank=64, alpha=16.0, dropout=0.05)


def args_of(topology: str, **changes: Any) -> PlanDryRun:
    run = TrainConfig(model=Path("e5-v"), output=Path("unused"), lora=LORA, **changes)
    return PlanDryRun(run=run, topology=topology)


def test_meshes_have_all_chips_and_split_no_head() -> None:
    found = [(x.data, x.fsdp, x.tensor) for x in plan._meshes(8, 4)]
    assert len(set(found)) == len(found) == 4 + 3 + 2
    assert all(data * fsdp * tensor == 8 and 4 % tensor == 0 for data, fsdp, tensor in found)
    assert (8, 1, 1) in found and (1, 2, 4) in found


def test_the_plans_for_a_gpu_are_by_formula(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["plan", "--model", "e5-v", "--topology", "gpu:h100:8", "--json"])
    assert not done.value.code
    found = json.loads(capsys.readouterr().out)
    assert len(found["plans"]) == 3 and found["slower"] > 100 and found["too_large"] > 0
    best = found["plans"][0]
    assert best["fits"] and best["method"] == "estimated"
    assert [x["step_seconds"] for x in found["plans"]] == sorted(
        x["step_seconds"] for x in found["plans"]
    )
    # the flags are those of training, and mean the plan
    words = ["--model", "e5-v", "--output", "x", *shlex.split(best["flags"])]
    run = tyro.cli(TrainConfig, args=words)
    plans = search_plans(args_of("gpu:h100:8"))
    assert plans.best is not None
    assert dataclasses.replace(plans.best.run, output=run.output) == run
    # nothing that it left out is faster by formula and fits
    assert all(x.seconds >= plans.best.seconds for x in plans.slower)


def test_what_compiling_says_counts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The two that the formula ranks first need twice the memory: others take their place."""
    asked: list[Plan] = []

    def compiled(found: Plan, _: Any) -> Plan:
        asked.append(found)
        peak = found.report.cost.peak * (2 if len(asked) <= 2 else 1) * 5 // 8
        cost = dataclasses.replace(found.report.cost, peak=peak, method="compiled")
        return dataclasses.replace(found, report=dataclasses.replace(found.report, cost=cost))

    monkeypatch.setattr(plan, "_compile", compiled)
    plans = search_plans(args_of("v5e:4x8"))
    assert len(asked) == 5 and len(plans.tried) == 5
    assert [x.report.fits for x in plans.tried] == [True] * 3 + [False] * 2
    assert plans.best is not None and plans.best.run == asked[2].run
    plans.print()
    said = capsys.readouterr().out
    assert said.startswith(plans.best.flags)
    assert said.count("does not fit") == 2
    assert "more are slower by formula" in said and "do not fit by formula" in said


def test_a_host_is_part_of_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is near, nothing is computed twice; where its rate is unknown, it is left alone."""
    near = search_plans(args_of("gpu:gh200:4"))
    assert near.best is not None and near.best.run.remat == "offload_dots"
    assert near.best.report.cost.flops == near.best.report.useful_flops
    every = [*near.tried, *near.slower, *near.too_large]
    assert not any(x.run.chunk_size for x in every if x.run.remat in OFFLOADED)
    assert {x.run.remat for x in every} >= set(OFFLOADED)
    crowded = search_plans(args_of("gpu:h100:1")).too_large
    assert any(x.report.cost.host_memory > 250e9 for x in crowded)
    monkeypatch.setattr(plan, "_compile", lambda found, _: found)
    unknown = search_plans(args_of("tpu7x:2x2x1"))
    every = [*unknown.tried, *unknown.slower, *unknown.too_large]
    assert every and not any(x.run.remat in OFFLOADED for x in every)


def test_no_accelerator_of_this_machine_is_started() -> None:
    """Nor libtpu, which would compile without the flags that it is given for plans."""
    program = """
from e5v_jax.dryrun.__main__ import main
try:
    main(["plan", "--model", "e5-v", "--topology", "gpu:h100:1"])
except SystemExit as end:
    assert not end.code
import jax
assert jax.config.jax_platforms == "cpu"
"""
    environment = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)


def test_kinds_of_a_base_are_tried_if_named() -> None:
    asked = args_of("gpu:h100:1")
    plain = search_plans(asked)
    assert {x.run.quantize for x in plain.tried + plain.slower} == {None}
    both = search_plans(dataclasses.replace(asked, quantizations=(None, "nf4")))
    assert {x.run.quantize for x in both.tried + both.slower} == {None, "nf4"}


def test_the_data_decides_on_groups(tmp_path: Path) -> None:
    """Each number of groups with the lengths of the run's own batches, and what that saves."""
    cfg = dataclasses.replace(config(make_folder(tmp_path), tmp_path / "run"), batch_size=8)
    asked = PlanDryRun(run=cfg, topology="gpu:h100:1")
    plans = search_plans(asked)
    every = [*plans.tried, *plans.slower, *plans.too_large]
    by_groups = {x.run.data.length_groups: x.lengths for x in every}
    assert set(by_groups) == {1, 2, 4, 8} and all(n == len(x) for n, x in by_groups.items())
    base = ConvertedFolder(cfg.model)
    tokens = tokenize_pairs(load_data(cfg.data), open_base(cfg, base), cfg.data)
    assert by_groups[1] == (tokens.lengths.max(),)
    plain = [x for x in every if x.run.chunk_size is None and x.run.remat == "full"]
    flops = {len(x.lengths): x.report.cost.flops for x in plain}
    assert flops[1] > flops[2] > flops[4] > flops[8]
    # 24 sentences of a model of 8 billion parameters: its weights are read for each group
    large = search_plans(dataclasses.replace(asked, architecture="llava-next-llama3-8b"))
    assert large.best is not None and len(large.best.lengths) == 1
    best = plans.best
    assert best is not None and f"--data.length-groups {len(best.lengths)}" in best.flags
    # lengths that are given are those of one plan
    given = search_plans(dataclasses.replace(asked, sequence_lengths=(96,)))
    assert {x.lengths for x in given.tried + given.slower} == {(96,)}
    assert given.best is not None and "length-groups" not in given.best.flags


def test_data_that_is_no_triplets_is_refused(tmp_path: Path) -> None:
    cfg = config(make_folder(tmp_path), tmp_path / "run")
    (tmp_path / "pairs.csv").write_text("sent0,sent1\na dog,an animal\na cat,a pet\n")
    data = dataclasses.replace(cfg.data, path=(tmp_path / "pairs.csv",))
    asked = PlanDryRun(run=dataclasses.replace(cfg, data=data), topology="gpu:h100:1")
    with pytest.raises(ValueError, match=r"a plan is for triplets of texts.*leave --plan out"):
        search_plans(asked)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="no figures to plan by"):
        search_plans(args_of("cpu"))
    with pytest.raises(ValueError, match="--batch-size: 7 triplets split over no mesh"):
        search_plans(args_of("gpu:h100:64", batch_size=7))


# --- the plan of this machine ---


def devices(kind: str, platform: str, *coords: tuple[int, ...]) -> list[Any]:
    return [SimpleNamespace(device_kind=kind, platform=platform, coords=at) for at in coords]


def test_the_topology_of_devices() -> None:
    square = [(x, y, 0) for x in range(2) for y in range(4)]
    assert here.topology_of(devices("TPU v5 lite", "tpu", *square)).name == "v5e:2x4"
    assert here.topology_of(devices("TPU v6 lite", "tpu", (0, 0, 0))).name == "v6e:1x1"
    cube = [(x, y, z) for x in range(2) for y in range(2) for z in range(3)]
    assert here.topology_of(devices("TPU v5p", "tpu", *cube)).name == "v5p:2x2x3"
    assert here.topology_of(devices("NVIDIA H100 80GB HBM3", "gpu", (), ())).name == "gpu:h100:2"
    for kind, platform in (("NVIDIA T4", "gpu"), ("cpu", "cpu"), ("TPU v3", "tpu")):
        with pytest.raises(ValueError, match="no figures to plan by for a device of kind"):
            here.topology_of(devices(kind, platform, (0, 0, 0)))


def test_no_more_of_the_host_than_there_is() -> None:
    chips = parse_topology("gpu:h100:8")
    found = here.with_host(chips).chip
    assert chips.chip is not None and found is not None
    total = 1024 * int(Path("/proc/meminfo").read_text().split()[1])  # MemTotal, in kB
    assert 0.7 * total < found.host_memory * jax.local_device_count() < 0.8 * total
    assert found.host_memory < chips.chip.host_memory
    assert dataclasses.replace(found, host_memory=chips.chip.host_memory) == chips.chip


def test_a_run_follows_its_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run has what the plan says; another start goes on with it, whatever its flags say."""
    folder = make_folder(tmp_path)
    chips = parse_topology(f"gpu:h100:{len(jax.devices())}")
    monkeypatch.setattr(here, "topology_of", lambda found: chips)
    cfg = config(folder, tmp_path / "run")
    start(TrainCommand(dataclasses.replace(cfg, remat="full", max_steps=2), plan="auto"))
    saved = json.loads((cfg.output / "run.json").read_text())["config"]
    assert saved["remat"] == "none" and saved["chunk_size"] is None  # it is tiny
    assert saved["data"]["length_groups"] != cfg.data.length_groups
    mesh = saved["mesh"]
    assert mesh["data"] * mesh["fsdp"] * mesh["tensor"] == len(jax.devices())
    again = dataclasses.replace(cfg, remat="full", max_steps=2, resume=True)
    assert here.plan_here(again).remat == "none"
    assert here.plan_here(again).data.length_groups == saved["data"]["length_groups"]
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"leave it out"):
        start(TrainCommand(dataclasses.replace(cfg, output=tmp_path / "other"), plan="auto"))
    assert not (tmp_path / "other").exists()
    assert [x["step"] for x in read_metrics(cfg.output) if "loss" in x][-1] == 2
