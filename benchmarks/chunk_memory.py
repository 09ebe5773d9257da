"""Peak memory and step time of our training by --chunk-size, each in a process of its own.

    python benchmarks/chunk_memory.py --model BASE --data triplets_snli.csv

The same steps as benchmarks/train_throughput.py, whose losses must not depend on the chunk size.
Table: docs/benchmarks.md.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import train_throughput
import tyro
from encode_side_by_side import Side, serve, summarize, take_turns

OURS: Side = "e5v-jax"


@dataclass(frozen=True)
class Args:
    """Measure training steps with several chunk sizes."""

    model: Path
    """Converted folder of the base model."""
    data: tuple[Path, ...]
    """csv files with columns sent0, sent1, hard_neg."""
    chunk_sizes: tuple[int | None, ...] = (None, 96, 48, 24)
    """Sentences in the model at a time; None is the whole batch."""
    batch_size: int = 64
    """Triplets a step."""
    steps: int = 2
    """Timed steps, after one that is not."""
    length_groups: int = 1
    """Groups shrink what is in the model at a time too: 1 shows the chunks alone."""
    remat: Literal["none", "dots", "full"] = "full"
    """What the backward pass keeps of each layer."""
    chunk_size: int | None = None
    """Of a process that the command starts."""
    side: Side | None = None
    """Be such a process (the command starts itself so)."""


def main(args: Args) -> None:
    """Measure one chunk size, or start a process for each."""
    if args.side is not None:
        training = train_throughput.Args(
            model=args.model,
            data=args.data,
            batch_size=args.batch_size,
            length_groups=args.length_groups,
            remat=args.remat,
            chunk_size=args.chunk_size,
        )
        serve(lambda: train_throughput.open_ours(training))
        return
    losses = []
    print("| chunk size | s/step (median) | steps, s | first step, s | peak memory, MB | losses |")
    print("|---|---|---|---|---|---|")
    for size in args.chunk_sizes:
        flags = () if size is None else ("--chunk-size", str(size))
        answers = take_turns(1 + args.steps, *flags, sides=(OURS,))[OURS]
        result = summarize(answers)
        losses.append([answer["loss"] for answer in answers])
        print(
            f"| {size} | {np.median(result.seconds):.2f} | "
            f"{' '.join(f'{seconds:.2f}' for seconds in result.seconds)} | "
            f"{result.first_seconds:.2f} | {result.peak_bytes / 1e6:.0f} | "
            f"{' '.join(f'{loss:.5f}' for loss in losses[-1])} |",
            flush=True,
        )
    difference = np.ptp(losses, axis=0).max()
    print(f"\nlargest difference of a step's losses: {difference:.1e}")
    if not difference <= 1e-4:
        raise SystemExit("the losses depend on the chunk size")


if __name__ == "__main__":
    main(tyro.cli(Args))
