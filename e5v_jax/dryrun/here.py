"""A plan for the accelerators of this machine, as ``python -m e5v_jax.train --plan auto`` wants."""

import dataclasses
import json
import logging
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from e5v_jax.checkpoints.adapters import read_run_info
from e5v_jax.checkpoints.converted import ConvertedFolder
from e5v_jax.dryrun.chips import GPUS
from e5v_jax.dryrun.lengths import data_lengths
from e5v_jax.dryrun.plan import Place, Plan, find_plans
from e5v_jax.dryrun.topology import Topology, parse_topology
from e5v_jax.runtime import Runtime
from e5v_jax.sharding import make_mesh
from e5v_jax.train.config import MeshConfig, TrainConfig

_logger = logging.getLogger(__name__)
_COMPILES = 3
_KINDS = {  # what JAX calls TPUs, the longest names first
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5p": "v5p",
    "TPU v5": "v5p",
    "TPU v4": "v4",
    "TPU7x": "tpu7x",
    "TPU v7": "tpu7x",
}


def plan_here(cfg: TrainConfig) -> TrainConfig:
    """Set mesh, chunks, length groups and remat of a run to the fastest that fits these devices.

    A run that goes on keeps the ones that it has. Raises ValueError: nothing is known of these
    devices, nothing fits, or one line naming file and row; FileNotFoundError: no such data.
    """
    if cfg.resume and (cfg.output / "run.json").is_file():
        saved = read_run_info(cfg.output)["config"]
        kept = {name: saved[name] for name in ("chunk_size", "remat")}
        groups = {"length_groups": saved["data"]["length_groups"]}
        words = {**kept, **groups, "mesh": saved["mesh"]}
        _logger.info("plan: the run's own, %s", json.dumps(words))
        mesh, data = MeshConfig(**saved["mesh"]), dataclasses.replace(cfg.data, **groups)
        return dataclasses.replace(cfg, mesh=mesh, data=data, **kept)
    topology, base = with_host(topology_of(jax.devices())), ConvertedFolder(cfg.model)
    place = Place(
        topology,
        str(cfg.model),
        base.family,
        base.config,
        data_lengths(cfg, base, topology.chips),
        lambda mesh: Runtime.on(make_mesh(mesh.data, mesh.fsdp, mesh.tensor)),
    )

    def say(plan: Plan) -> None:
        report = plan.report
        fits = "" if report.fits else ", does not fit"
        _logger.info("plan: %.1f ms%s, %s", 1e3 * plan.seconds, fits, plan.flags)

    plans = find_plans(cfg, place, quantizations=(cfg.quantize,), compiles=_COMPILES, on_plan=say)
    if plans.best is None:
        raise ValueError(
            f"--plan auto: nothing fits {topology.name}; give --quantize nf4, or more chips"
        )
    _logger.info("plan: %s", plans.best.flags)
    return plans.best.run


def with_host(topology: Topology) -> Topology:
    """The same chips with no more of a host's memory than three quarters of what is here for each.

    Of several processes the least counts, so that all have one plan.
    """
    assert topology.chip is not None  # as those of topology_of have
    bytes_here = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    own = np.float32(0.75 * bytes_here / jax.local_device_count())
    least = float(np.min(multihost_utils.process_allgather(own)))
    chip = dataclasses.replace(topology.chip, host_memory=min(least, topology.chip.host_memory))
    return dataclasses.replace(topology, chip=chip)


def topology_of(devices: Sequence[Any]) -> Topology:
    """The chips that these devices are. Raises ValueError: they have no published figures here."""
    kind, platform = devices[0].device_kind, devices[0].platform
    if platform == "gpu":
        name = next((name for name in GPUS if name in kind.lower()), None)
        if name is not None:
            return parse_topology(f"gpu:{name}:{len(devices)}")
    if platform == "tpu":
        name = next((own for known, own in _KINDS.items() if kind.startswith(known)), None)
        if name is not None:
            places = [device.coords for device in devices]
            sides = [max(axis) - min(axis) + 1 for axis in zip(*places, strict=True)]
            axes = 2 if name in ("v5e", "v6e") else 3
            return parse_topology(f"{name}:{'x'.join(map(str, sides[:axes]))}")
    raise ValueError(
        f"--plan auto: there are no figures to plan by for a device of kind {kind!r} ({platform}); "
        "leave it out"
    )
