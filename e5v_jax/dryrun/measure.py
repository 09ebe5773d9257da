"""One program compiled for a topology: what it takes and moves."""

import dataclasses
import re
import time
from typing import Any

import jax
import jax.numpy as jnp

from e5v_jax.dryrun.chips import GiB
from e5v_jax.dryrun.flops import traced_flops
from e5v_jax.dryrun.hlo import count_traffic
from e5v_jax.dryrun.program import Program, per_device_bytes
from e5v_jax.dryrun.report import Cost
from e5v_jax.dryrun.topology import Topology


def measure(program: Program, topology: Topology, estimate: Cost) -> Cost:
    """Compile and read what XLA made of it; ``estimate`` where it cannot be, or is too large."""
    if topology.platform == "gpu":
        return estimate
    traced = program.trace()
    per_chip = topology.chip.jax_devices if topology.chip else 1
    cost = dataclasses.replace(
        estimate,
        method="compiled",
        parameters=per_device_bytes((program.frozen, program.trainable)) * per_chip,
        optimizer=per_device_bytes(program.optimizer) * per_chip,
        flops=traced_flops(traced.jaxpr) / topology.chips,
        int8_flops=traced_flops(traced.jaxpr, operands=jnp.int8) / topology.chips,
    )
    start = time.perf_counter()
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if (needed := needed_memory(str(error), cost.parameters + cost.optimizer)) is None:
            raise
        seconds = time.perf_counter() - start
        return dataclasses.replace(cost, peak=needed, live=needed, compile_seconds=seconds)
    seconds = time.perf_counter() - start
    stats = compiled.memory_analysis()
    traffic = count_traffic(compiled.as_text(), devices=topology.chips * per_chip)
    return dataclasses.replace(
        cost,
        peak=reserved_memory(stats) * per_chip,
        # XLA's peak has the host's memory in it, too
        live=(stats.peak_memory_in_bytes - stats.host_temp_size_in_bytes) * per_chip,
        host_memory=stats.host_temp_size_in_bytes * per_chip,
        host_bytes=traffic.host_bytes * per_chip,
        hbm_bytes=traffic.hbm_bytes * per_chip,
        collective_bytes={k: size * per_chip for k, size in traffic.collective_bytes.items()},
        compile_seconds=seconds,
    )


def reserved_memory(stats: Any) -> int:
    """Bytes that a compiled program must find free on a device, its arguments included.

    XLA's own ``peak_memory_in_bytes`` is lower, by what never holds anything at the same time.
    """
    return int(
        stats.argument_size_in_bytes
        + stats.output_size_in_bytes
        - stats.alias_size_in_bytes
        + stats.temp_size_in_bytes
        + stats.generated_code_size_in_bytes
    )


def needed_memory(error: str, parameters: int) -> int | None:
    """Bytes that a program too large would take, from libtpu's refusal; None of other errors.

    It names all that the program uses, or only what the program has besides its arguments.
    """
    used = re.search(r"Used ([\d.]+)([GMK]) of [\d.]+[GMK] hbm", error)
    found = used or re.search(r"required for HLO temporaries \(([\d.]+)([GMK])\)", error)
    if found is None:
        return None
    size = float(found[1]) * {"G": GiB, "M": GiB >> 10, "K": GiB >> 20}[found[2]]
    return int(size) + (0 if used else parameters)
