"""What a dry run says: memory of one chip against what it has, and the time its limits leave."""

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from e5v_jax.dryrun.chips import GiB
from e5v_jax.dryrun.topology import Topology

Bound = Literal["compute", "memory", "interconnect", "host", "unknown"]


@dataclass(frozen=True)
class Cost:
    """What one chip has and does in one step (or batch)."""

    parameters: int  # bytes, base and LoRA
    optimizer: int  # bytes
    peak: int  # bytes, all that the program must find free
    live: int  # bytes that hold something at the worst moment; XLA's allotment loses the rest
    flops: float
    hbm_bytes: float
    collective_bytes: dict[str, float] = field(default_factory=dict)  # by kind
    method: Literal["compiled", "estimated"] = "estimated"
    compile_seconds: float = 0.0
    int8_flops: float = 0.0  # of flops, those of int8 by int8
    host_memory: int = 0  # bytes of the host's memory
    host_bytes: float = 0.0  # to and from there

    @property
    def activations(self) -> int:
        """What is neither parameters nor optimizer: activations, gradients, gathered weights."""
        return max(self.peak - self.parameters - self.optimizer, 0)


@dataclass(frozen=True)
class Report:
    """A dry run's result."""

    program: str
    architecture: str
    topology: Topology
    cost: Cost
    useful_flops: float  # of a chip and step, if nothing were computed twice
    items: int  # of a step over all chips: triplets, images or texts
    item: str
    tokens: int  # positions of a step over all chips, padding included
    remedies: tuple[str, ...]  # to be tried in this order if it does not fit

    @property
    def capacity(self) -> int | None:
        """Bytes a program may take on one chip; None on this machine's CPU."""
        return None if self.topology.chip is None else self.topology.chip.usable_hbm

    @property
    def fits(self) -> bool:
        """Whether the peak is within the capacity, and the host's memory is enough."""
        return (self.capacity is None or self.cost.peak <= self.capacity) and self.host_fits

    @property
    def host_fits(self) -> bool:
        """Whether the host's memory is enough."""
        chip = self.topology.chip
        return chip is None or self.cost.host_memory <= chip.host_memory

    @property
    def seconds(self) -> dict[Bound, float]:
        """The least time that each limit leaves, all else at its peak."""
        chip = self.topology.chip
        if chip is None:
            return {}
        moved = sum(self.cost.collective_bytes.values())
        found: dict[Bound, float] = {
            "compute": (self.cost.flops - self.cost.int8_flops) / chip.flops
            + self.cost.int8_flops / chip.int8_ops,
            "memory": self.cost.hbm_bytes / chip.hbm_bandwidth,
            "interconnect": moved / self.topology.collective_bandwidth,
        }
        if self.cost.host_bytes and chip.host_bandwidth:
            # the forward pass sends, the backward pass fetches: never both at once
            found["host"] = self.cost.host_bytes / chip.host_bandwidth
        return found

    @property
    def bound(self) -> Bound:
        """The limit that takes longest."""
        seconds = self.seconds
        return max(seconds, key=lambda name: seconds[name]) if seconds else "unknown"

    @property
    def step_seconds(self) -> float | None:
        """Roofline: the longest of :attr:`seconds`, as if the others ran beside it for nothing."""
        return max(self.seconds.values(), default=None)

    @property
    def utilization(self) -> float | None:
        """Model FLOP utilisation at the roofline: recomputation does not count as useful.

        Of int8 matmuls the peak is that of int8, of others that of bf16.
        """
        if not self.step_seconds:
            return None
        useful = self.useful_flops / self.cost.flops
        return useful * self.seconds["compute"] / self.step_seconds

    def to_json(self) -> dict[str, object]:
        """Everything, in bytes, FLOPs and seconds."""
        cost = dataclasses.asdict(self.cost) | {"activations": self.cost.activations}
        memory = ("parameters", "optimizer", "peak", "live", "activations", "host_memory")
        return {
            "program": self.program,
            "architecture": self.architecture,
            "topology": self.topology.name,
            "chips": self.topology.chips,
            "memory": {name: cost.pop(name) for name in memory},
            **cost,
            "capacity": self.capacity,
            "fits": self.fits,
            "remedy": None if self.fits else self.remedies[0],
            "useful_flops": self.useful_flops,
            "seconds": self.seconds,
            "bound": self.bound,
            "step_seconds": self.step_seconds,
            "utilization": self.utilization,
            "items_per_step": self.items,
            "item": self.item,
            "tokens_per_step": self.tokens,
        }

    def verdict(self) -> str:
        """Fits or not, by how much, and what to try."""
        if self.capacity is None:
            return ""
        spare, capacity = self.capacity - self.cost.peak, gib(self.capacity)
        if spare >= 0:
            return f"fits: {gib(spare)} of {capacity} to spare"
        remedy = self.remedies[0]
        return f"does not fit: {gib(-spare)} more than the {capacity} of a chip; try {remedy}"

    def host_verdict(self) -> str:
        """Fits or not, and what to try."""
        chip = self.topology.chip
        if chip is None:
            return ""
        room = f"a host has {gib(chip.host_memory)} for each chip"
        return (
            f"fits: {room}" if self.host_fits else f"does not fit: {room}; try {self.remedies[0]}"
        )

    def host_rate(self) -> str:
        """What the time of :attr:`seconds` rests on, or that there is none."""
        chip = self.topology.chip
        if chip is None or chip.host_bandwidth is None:
            return "at a rate that is not known"
        return f"at {chip.host_bandwidth / 1e9:.0f} GB/s at best"

    def print(self) -> None:
        """Show it as a table."""
        cost, moved = self.cost, self.cost.collective_bytes
        kinds = [f"{kind} {size / 1e9:.2f}" for kind, size in moved.items() if size >= 1e6]
        host = []
        if cost.host_memory:
            host = [
                ("on the host", gib(cost.host_memory), self.host_verdict()),
                ("host traffic", f"{cost.host_bytes / 1e9:.1f} GB", self.host_rate()),
            ]
        rows = [
            ("parameters", gib(cost.parameters), ""),
            ("optimizer", gib(cost.optimizer), ""),
            ("activations", gib(cost.activations), "with gradients and gathered weights"),
            ("peak", gib(cost.peak), self.verdict()),
            ("FLOPs", f"{cost.flops / 1e12:.1f} T", f"useful: {self.useful_flops / 1e12:.1f} T"),
            ("memory traffic", f"{cost.hbm_bytes / 1e9:.1f} GB", ""),
            ("collectives", f"{sum(moved.values()) / 1e9:.1f} GB", ", ".join(kinds)),
            *host,
            *((f"{name} time", f"{1e3 * s:.1f} ms", "") for name, s in self.seconds.items()),
        ]
        if self.step_seconds:
            rate = f"{self.items / self.step_seconds:.1f} {self.item}/s on all chips"
            share = f"{100 * (self.utilization or 0):.0f} % of peak FLOP/s are useful work"
            text = f"bound by {self.bound}; {rate}; {share}"
            rows.append(("step at best", f"{1e3 * self.step_seconds:.1f} ms", text))
        seconds = f" in {cost.compile_seconds:.0f} s" if cost.compile_seconds else ""
        print(
            f"{self.program}, {self.architecture}, {self.topology.name} "
            f"({self.topology.chips} chips), {cost.method}{seconds}. Per chip and step:"
        )
        for name, value, text in rows:
            print(f"{name:17} {value:>12}  {text}".rstrip())


def gib(size: float) -> str:
    """Bytes for a reader."""
    return f"{size / GiB:.2f} GiB"
