"""Bulk encoding end to end, from a file to Parquet: ``python -m e5v_jax.encode`` and its figures.

python benchmarks/encode_bulk.py --model MODEL --input texts.jsonl
"""

import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import tyro


@dataclass(frozen=True)
class Args:
    """Encode a file or folder into a temporary folder and print rates and sizes."""

    model: str
    """As for e5v_jax.encode."""
    input: Path
    """As for e5v_jax.encode."""
    dtype: str = "float32"
    """As for e5v_jax.encode."""
    shard_size: int = 4096
    """As for e5v_jax.encode."""


def main(args: Args) -> None:
    """Run the command twice: all of it, then with everything found there."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "vectors"
        words = ["--model", args.model, "--input", args.input, "--output", output]
        words += ["--dtype", args.dtype, "--shard-size", args.shard_size]
        command = [sys.executable, "-m", "e5v_jax.encode", *map(str, words)]
        seconds = []
        for _ in range(2):
            start = time.perf_counter()
            subprocess.run(command, check=True)
            seconds.append(time.perf_counter() - start)
        shards = sorted(output.glob("*.parquet"))
        rows = sum(pq.read_metadata(shard).num_rows for shard in shards)
        size = sum(shard.stat().st_size for shard in shards)
    print("\n| rows | shards | MB | whole command, s | rows/s | again, all there, s |")
    print("|---|---|---|---|---|---|")
    print(
        f"| {rows} | {len(shards)} | {size / 1e6:.1f} | {seconds[0]:.1f} | "
        f"{rows / seconds[0]:.1f} | {seconds[1]:.1f} |"
    )


if __name__ == "__main__":
    main(tyro.cli(Args))
