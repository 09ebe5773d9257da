"""The training benchmarks run, at tiny size, and notice when the two sides do different work."""

import subprocess
import sys
from pathlib import Path

import pytest
from hf_models import TEXT_RECIPES, build_text

from convert.from_hf import Args, convert

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny converted model and triplets of different lengths for it."""
    folder = tmp_path_factory.mktemp("tiny")
    build_text(TEXT_RECIPES["llama"], folder / "hf")
    convert(Args(str(folder / "hf"), folder / "model"))
    rows = [f"premise {i},{'so ' * (i % 7)}{i},no {i * i}" for i in range(24)]
    (folder / "triplets.csv").write_text("\n".join(["sent0,sent1,hard_neg", *rows]) + "\n")
    return folder


def run(name: str, folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    words = ["--model", folder / "model", "--data", folder / "triplets.csv", *flags]
    command = [sys.executable, ROOT / "benchmarks" / name, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True)


def table(text: str) -> list[list[str]]:
    """Its cells, without the header."""
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows][1:]


def test_throughput(folder: Path) -> None:
    sizes = ["--batch-size", "6", "--steps", "2", "--length-groups", "3"]
    done = run("train_throughput.py", folder, *sizes, "--gradient-checkpointing")
    assert done.returncode == 0, done.stderr
    ours, theirs = table(done.stdout)
    assert (ours[0], theirs[0]) == ("e5v-jax", "transformers")
    assert "length groups 3" in ours[-1] and "gradient checkpointing on" in theirs[-1]
    for row in (ours, theirs):
        assert float(row[1]) > 0 and len(row[2].split()) == 2 and float(row[4]) > 100
    first, second = (line for line in done.stdout.splitlines() if line.startswith("losses, "))
    assert len(first.split(": ")[1].split()) == len(second.split(": ")[1].split()) == 3


def test_chunk_memory(folder: Path) -> None:
    sizes = ["--batch-size", "6", "--steps", "1", "--chunk-sizes", "None", "6"]
    done = run("chunk_memory.py", folder, *sizes)
    assert done.returncode == 0, done.stderr
    rows = table(done.stdout)
    assert [row[0] for row in rows] == ["None", "6"]
    assert all(float(row[1]) > 0 and float(row[4]) > 100 for row in rows)
