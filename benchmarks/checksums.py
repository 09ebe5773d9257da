"""What checksums of a folder cost: seconds to write and to verify them, for files of a given size.

python benchmarks/checksums.py --gigabytes 2 --folder /tmp
"""

import platform
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from e5v_jax import cli
from e5v_jax.checksums import verify_checksums, write_checksums


@dataclass(frozen=True)
class Args:
    """Hash random files of 256 MB each, written just before (so that they are in memory)."""

    gigabytes: float = 2.0  # As a checkpoint of the paper's recipe: 168 M factors, three times.
    folder: Path = Path(tempfile.gettempdir())
    """Where the files go, on the disk to be measured."""
    repeats: int = 3  # Of each; the fastest and the slowest are printed.


def main(args: Args) -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder, rng, size = Path(name), np.random.default_rng(0), 256_000_000
        for i in range(max(round(args.gigabytes * 1e9 / size), 1)):
            (folder / f"{i}.bin").write_bytes(rng.bytes(size))
        total = sum(file.stat().st_size for file in folder.glob("*.bin")) / 1e9
        print(f"{total:.2f} GB, {platform.processor() or platform.machine()}")
        for what, work in (("write", write_checksums), ("verify", verify_checksums)):
            seconds = []
            for _ in range(args.repeats):
                start = time.perf_counter()
                work(folder)
                seconds.append(time.perf_counter() - start)
            fastest, slowest = min(seconds), max(seconds)
            print(f"{what}: {fastest:.2f} to {slowest:.2f} s, {total / fastest:.2f} GB/s")


if __name__ == "__main__":
    cli.run(main, Args)
