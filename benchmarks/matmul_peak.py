"""GFLOP/s of one fp32 matmul in XLA and in PyTorch, in the shapes of SmolLM2-135M and a ViT-S.

    python benchmarks/matmul_peak.py

What the other benchmarks' ratios can come to on a machine: where both sides reach its peak, a model
is as fast as it has few multiplications left that are padding, and little else beside them.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version

import numpy as np
import tyro

_SHAPES = ((576, 1536), (1536, 576), (576, 576), (384, 1536), (1536, 384))


@dataclass(frozen=True)
class Args:
    """Compare the matmuls of XLA and PyTorch."""

    rows: tuple[int, ...] = (256, 1024)
    """Of the left operand: positions."""
    repetitions: int = 30
    """Timed runs of each, after two that are not."""
    threads: int = 2
    """Of each."""


def median_seconds(run: Callable[[], object], repetitions: int) -> float:
    """The median time of ``run``."""
    seconds = []
    for _ in range(2 + repetitions):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds[2:]))


def main(args: Args) -> None:
    """Print a table: a row for each shape, each side in turn."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])  # before XLA starts
    import jax
    import jax.numpy as jnp
    import torch

    torch.set_num_threads(args.threads)
    multiply, linear = jax.jit(jnp.matmul), torch.nn.functional.linear
    print(f"{args.threads} CPUs, jax {version('jax')}, torch {version('torch')}, fp32\n")
    print("| [rows, in] x [in, out] | XLA, GFLOP/s | PyTorch, GFLOP/s |")
    print("|---|---|---|")
    for rows in args.rows:
        for inner, outer in _SHAPES:
            x, w = np.ones((rows, inner), np.float32), np.ones((inner, outer), np.float32)
            xla = partial(multiply, jnp.asarray(x), jnp.asarray(w))
            # [out, in], as torch's Linear has it
            mkl = partial(linear, torch.from_numpy(x), torch.from_numpy(w.T.copy()))
            rates = [
                2 * rows * inner * outer / median_seconds(run, args.repetitions) / 1e9
                for run in (lambda xla=xla: jax.block_until_ready(xla()), mkl)
            ]
            print(f"| [{rows}, {inner}] x [{inner}, {outer}] | {rates[0]:.0f} | {rates[1]:.0f} |")


if __name__ == "__main__":
    main(tyro.cli(Args))
