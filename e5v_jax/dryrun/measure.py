"""One program compiled for a topology: what it takes and moves; by formula where nothing can."""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax

from e5v_jax.dryrun.chips import GiB
from e5v_jax.dryrun.estimate import Estimate
from e5v_jax.dryrun.flops import traced_flops
from e5v_jax.dryrun.hlo import count_traffic
from e5v_jax.dryrun.program import Program, per_device_bytes
from e5v_jax.dryrun.report import Memory, Work
from e5v_jax.dryrun.topology import Topology


@dataclass(frozen=True)
class Measured:
    """Of one chip and one run of the program."""

    method: Literal["compiled", "estimated"]
    memory: Memory
    flops: float
    hbm_bytes: float
    collective_bytes: dict[str, float]
    compile_seconds: float = 0.0

    def as_fields(self, useful_flops: float) -> dict[str, Any]:
        """Of a Report."""
        work = Work(self.flops, useful_flops, self.hbm_bytes, self.collective_bytes)
        return {
            "method": self.method,
            "memory": self.memory,
            "work": work,
            "compile_seconds": self.compile_seconds,
        }


def measure(
    program: Program, topology: Topology, estimate: Callable[[], Estimate], flops_by_hand: float
) -> Measured:
    """Compile and read what XLA made of it; by formula where it cannot be, or is too large."""
    if topology.chip is not None and not topology.is_tpu:
        guess = estimate()
        return Measured(
            "estimated",
            guess.memory,
            flops_by_hand / topology.chips,
            guess.hbm_bytes,
            guess.collective_bytes,
        )
    traced = program.trace("tpu" if topology.is_tpu else "cpu")
    flops = traced_flops(traced.jaxpr) / topology.chips
    devices_per_chip = topology.chip.jax_devices if topology.chip else 1
    parameters = per_device_bytes((program.frozen, program.trainable)) * devices_per_chip
    optimizer = per_device_bytes(program.optimizer) * devices_per_chip
    start = time.perf_counter()
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        needed = needed_memory(str(error), parameters + optimizer)
        if needed is None:
            raise
        guess = estimate()
        return Measured(
            "compiled",
            Memory(parameters, optimizer, needed, needed),
            flops,
            guess.hbm_bytes,
            guess.collective_bytes,
            time.perf_counter() - start,
        )
    seconds = time.perf_counter() - start
    stats = compiled.memory_analysis()
    peak = reserved_memory(stats) * devices_per_chip
    live = stats.peak_memory_in_bytes * devices_per_chip
    traffic = count_traffic(compiled.as_text(), devices=topology.chips * devices_per_chip)
    return Measured(
        "compiled",
        Memory(parameters, optimizer, peak, live),
        flops,
        traffic.hbm_bytes * devices_per_chip,
        {kind: moved * devices_per_chip for kind, moved in traffic.collective_bytes.items()},
        seconds,
    )


def reserved_memory(stats: Any) -> int:
    """Bytes that a compiled program must find free on a device, its arguments included.

    XLA's own ``peak_memory_in_bytes`` is lower, by what never holds anything at the same time.
    """
    total = (
        stats.argument_size_in_bytes
        + stats.output_size_in_bytes
        - stats.alias_size_in_bytes
        + stats.temp_size_in_bytes
        + stats.generated_code_size_in_bytes
    )
    return int(total)


def needed_memory(error: str, parameters: int) -> int | None:
    """Bytes that a program too large would take, from libtpu's refusal; None of other errors.

    It names all that the program uses, or only what the program has besides its arguments.
    """
    used = re.search(r"Used ([\d.]+)([GMK]) of [\d.]+[GMK] hbm", error)
    temporary = re.search(r"required for HLO temporaries \(([\d.]+)([GMK])\)", error)
    found = used or temporary
    if found is None:
        return None
    size = float(found[1]) * {"G": GiB, "M": GiB >> 10, "K": GiB >> 20}[found[2]]
    return int(size) + (0 if used else parameters)
