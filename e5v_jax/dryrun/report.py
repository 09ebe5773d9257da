"""What a dry run says: memory of one chip against what it has, and the time its limits leave."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from rich.console import Console
from rich.table import Table

from e5v_jax.dryrun.chips import GiB
from e5v_jax.dryrun.topology import Topology

Bound = Literal["compute", "memory", "interconnect", "unknown"]


@dataclass(frozen=True)
class Memory:
    """Bytes of one chip."""

    parameters: int  # base and LoRA
    optimizer: int
    peak: int  # all that the program must find free
    live: (
        int  # of which so much holds something at the worst moment; XLA's allotment loses the rest
    )

    @property
    def activations(self) -> int:
        """What is neither parameters nor optimizer: activations, gradients, gathered weights."""
        return max(self.peak - self.parameters - self.optimizer, 0)


@dataclass(frozen=True)
class Work:
    """One step (or batch) of one chip."""

    flops: float
    useful_flops: float  # of which an implementation that keeps everything would need so many
    hbm_bytes: float
    collective_bytes: dict[str, float]


@dataclass(frozen=True)
class Report:
    """A dry run's result; all figures are of one chip and one step."""

    program: str
    architecture: str
    topology: Topology
    method: Literal["compiled", "estimated"]
    memory: Memory
    work: Work
    items: int  # of a step over all chips: triplets, images or texts
    item: str
    tokens: int  # positions of a step over all chips, padding included
    remedies: tuple[str, ...]  # to be tried in this order if it does not fit
    compile_seconds: float = 0.0

    @property
    def capacity(self) -> int | None:
        """Bytes a program may take on one chip; None on this machine's CPU."""
        return None if self.topology.chip is None else self.topology.chip.usable_hbm

    @property
    def fits(self) -> bool:
        """Whether the peak is within the capacity."""
        return self.capacity is None or self.memory.peak <= self.capacity

    @property
    def seconds(self) -> dict[Bound, float]:
        """The least time that each limit leaves, all else at its peak."""
        chip = self.topology.chip
        if chip is None:
            return {}
        moved = sum(self.work.collective_bytes.values())
        return {
            "compute": self.work.flops / chip.flops,
            "memory": self.work.hbm_bytes / chip.hbm_bandwidth,
            "interconnect": moved / self.topology.collective_bandwidth,
        }

    @property
    def bound(self) -> Bound:
        """The limit that takes longest."""
        seconds = self.seconds
        return max(seconds, key=lambda name: seconds[name]) if seconds else "unknown"

    @property
    def step_seconds(self) -> float | None:
        """Roofline: the longest of :attr:`seconds`, as if the others ran beside it for nothing."""
        return self.seconds[self.bound] if self.seconds else None

    @property
    def utilization(self) -> float | None:
        """Model FLOP utilisation at the roofline: recomputation does not count as useful."""
        chip, seconds = self.topology.chip, self.step_seconds
        if chip is None or not seconds:
            return None
        return self.work.useful_flops / chip.flops / seconds

    def to_json(self) -> dict[str, object]:
        """Everything, in bytes, FLOPs and seconds."""
        return {
            "program": self.program,
            "architecture": self.architecture,
            "topology": self.topology.name,
            "chips": self.topology.chips,
            "method": self.method,
            "memory": {**dataclasses.asdict(self.memory), "activations": self.memory.activations},
            "capacity": self.capacity,
            "fits": self.fits,
            "remedy": None if self.fits else self.remedies[0],
            "flops": self.work.flops,
            "useful_flops": self.work.useful_flops,
            "hbm_bytes": self.work.hbm_bytes,
            "collective_bytes": self.work.collective_bytes,
            "seconds": self.seconds,
            "bound": self.bound,
            "step_seconds": self.step_seconds,
            "utilization": self.utilization,
            "items_per_step": self.items,
            "item": self.item,
            "tokens_per_step": self.tokens,
            "compile_seconds": self.compile_seconds,
        }

    def verdict(self) -> str:
        """Fits or not, by how much, and what to try."""
        if self.capacity is None:
            return f"peak {gib(self.memory.peak)}"
        spare = self.capacity - self.memory.peak
        if spare >= 0:
            return f"fits: {gib(spare)} of {gib(self.capacity)} to spare"
        return (
            f"does not fit: {gib(-spare)} more than the {gib(self.capacity)} of a chip; "
            f"try {self.remedies[0]}"
        )

    def print(self) -> None:
        """Show it as a table."""
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        table.add_column(no_wrap=True)
        table.add_column(justify="right", no_wrap=True)
        table.add_column()
        memory, work = self.memory, self.work
        rows = [
            ("parameters", gib(memory.parameters), ""),
            ("optimizer", gib(memory.optimizer), ""),
            ("activations", gib(memory.activations), "with gradients and gathered weights"),
            ("peak", gib(memory.peak), self.verdict()),
            ("FLOPs", f"{work.flops / 1e12:.1f} T", f"useful: {work.useful_flops / 1e12:.1f} T"),
            ("memory traffic", f"{work.hbm_bytes / 1e9:.1f} GB", ""),
            ("collectives", f"{sum(work.collective_bytes.values()) / 1e9:.1f} GB", _kinds(work)),
        ]
        rows += [(f"{k} time", f"{1e3 * s:.1f} ms", "") for k, s in self.seconds.items()]
        if self.step_seconds:
            rate = self.items / self.step_seconds
            share = f"{100 * (self.utilization or 0):.0f} % of peak FLOP/s are useful work"
            text = f"bound by {self.bound}; {rate:.1f} {self.item}/s on all chips; {share}"
            rows.append(("step at best", f"{1e3 * self.step_seconds:.1f} ms", text))
        for row in rows:
            table.add_row(*row)
        how = f"{self.method}"
        if self.compile_seconds:
            how += f" in {self.compile_seconds:.0f} s"
        console = Console(soft_wrap=True)
        console.print(
            f"{self.program}, {self.architecture}, {self.topology.name} "
            f"({self.topology.chips} chips), {how}. Per chip and step:",
            highlight=False,
        )
        console.print(table, highlight=False)


def gib(size: float) -> str:
    """Bytes for a reader."""
    return f"{size / GiB:.2f} GiB"


def _kinds(work: Work) -> str:
    kinds = {k: v for k, v in work.collective_bytes.items() if v >= 1e6}
    return ", ".join(f"{kind} {moved / 1e9:.2f}" for kind, moved in kinds.items())
