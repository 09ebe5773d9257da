"""Bulk encoding end to end, from a jsonl file to Parquet: ours and PyTorch on the same sentences.

    python benchmarks/encode_bulk.py --sentences shared/data/sts --limit 1024

Ours is the command ``python -m e5v_jax.encode``, from its start to its end, and once more when
everything is there. PyTorch is the loop of encode_text.py around a reader and a writer, its clock
started only when the model is loaded. In turns, on the same threads.
"""

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import encode_text
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tyro


@dataclass(frozen=True)
class Args:
    """Encode sentences of STS-B test from a file to Parquet and print rates and sizes."""

    sentences: Path
    """Folder with STS/STSBenchmark/sts-test.csv."""
    limit: int | None = None
    """Only so many sentences."""
    repetitions: int = 2
    """Runs of each."""
    shard_size: int = 4096
    """As for e5v_jax.encode."""
    threads: int = 2
    """PyTorch's; XLA takes all of the machine's."""
    model: Path | None = None
    """SmolLM2-135M-Instruct, converted; by default that is done first."""
    reference: tuple[Path, Path] | None = None
    """Be PyTorch: read this file, write that one (the command starts itself so)."""


def run_reference(args: Args, source: Path, target: Path) -> None:
    """Embed the texts of a jsonl file into a Parquet file; prints the seconds it took."""
    texts: list[str] = []
    encode, _ = encode_text.open_reference(
        encode_text.Args(args.sentences, threads=args.threads), texts
    )
    start = time.perf_counter()
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    texts.extend(row["text"] for row in rows)
    vectors = encode()
    flat = pa.array(vectors.ravel())
    table = pa.table(
        {
            "id": [row["id"] for row in rows],
            "embedding": pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1]),
        }
    )
    pq.write_table(table, target)
    print(time.perf_counter() - start)


def read_vectors(files: list[Path]) -> np.ndarray:
    """[N, D] of the column ``embedding``, in order."""
    columns = [pq.read_table(file)["embedding"].combine_chunks() for file in files]
    return np.concatenate([c.flatten().to_numpy().reshape(len(c), -1) for c in columns])


def main(args: Args) -> None:
    """Run both in turns and print a table."""
    if args.reference is not None:
        run_reference(args, *args.reference)
        return
    sentences = encode_text.read_sentences(args.sentences, args.limit)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = folder / "texts.jsonl"
        rows = [json.dumps({"id": str(i), "text": text}) for i, text in enumerate(sentences)]
        source.write_text("\n".join(rows) + "\n")
        model = args.model or folder / "model"
        if args.model is None:
            gguf = encode_text.find_gguf()
            convert = [sys.executable, "-m", "convert.from_hf", str(gguf), str(model)]
            subprocess.run(convert, check=True)
        seconds: dict[str, list[float]] = {"ours": [], "again": [], "reference": []}
        for i in range(args.repetitions):
            output = folder / f"vectors-{i}"
            words = ["--model", model, "--input", source, "--output", output]
            words += ["--dtype", "float32", "--shard-size", args.shard_size]
            command = [sys.executable, "-m", "e5v_jax.encode", *map(str, words)]
            for what in ("ours", "again"):
                start = time.perf_counter()
                subprocess.run(command, check=True)
                seconds[what].append(time.perf_counter() - start)
            theirs = folder / "reference.parquet"
            words = ["--reference", source, theirs, "--threads", args.threads]
            done = subprocess.run(
                [sys.executable, __file__, "--sentences", args.sentences, *map(str, words)],
                check=True,
                stdout=subprocess.PIPE,
                text=True,
            )
            seconds["reference"].append(float(done.stdout.splitlines()[-1]))
        shards = sorted(output.glob("*.parquet"))
        difference = np.abs(read_vectors(shards) - read_vectors([theirs])).max()
        size = sum(shard.stat().st_size for shard in shards)
    print(f"\nlargest difference of two unit vectors' entries: {difference:.1e}")
    print(f"{len(sentences)} texts, {len(shards)} shards, {size / 1e6:.1f} MB")
    print("\n| | texts/s (median) | all runs, s |")
    print("|---|---|---|")
    names = {"ours": "e5v-jax, whole command", "reference": "transformers, model loaded before"}
    for what, label in names.items():
        runs = " ".join(f"{second:.1f}" for second in seconds[what])
        print(f"| {label} | {len(sentences) / np.median(seconds[what]):.2f} | {runs} |")
    again = " ".join(f"{second:.1f}" for second in seconds["again"])
    print(f"\nthe same command again, all shards there, s: {again}")


if __name__ == "__main__":
    main(tyro.cli(Args))
