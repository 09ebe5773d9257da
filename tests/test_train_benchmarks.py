"""The training benchmarks run, at tiny size, and notice when the two sides do different work."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hf_models import TEXT_RECIPES, build_text, picture

from e5v_jax.checkpoints.from_hf import Args, convert

pytestmark = pytest.mark.slow
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
    sizes = ["--batch-size", "6", "--turns", "2", "--steps", "1", "--length-groups", "3"]
    done = run("train_throughput.py", folder, *sizes, "--gradient-checkpointing")
    assert done.returncode == 0, done.stderr
    ours, theirs = table(done.stdout)
    assert (ours[0], theirs[0]) == ("e5v-jax", "transformers")
    assert "length groups 3" in ours[-1] and "gradient checkpointing on" in theirs[-1]
    for row in (ours, theirs):
        assert float(row[1]) > 0 and len(row[2].split()) == 2 and float(row[4]) > 100
    first, second = (line for line in done.stdout.splitlines() if line.startswith("losses, "))
    assert len(first.split(": ")[1].split()) == len(second.split(": ")[1].split()) == 4


def test_chunk_memory(folder: Path) -> None:
    sizes = ["--batch-size", "6", "--steps", "1", "--chunk-sizes", "None", "6"]
    done = run("chunk_memory.py", folder, *sizes)
    assert done.returncode == 0, done.stderr
    rows = table(done.stdout)
    assert [row[0] for row in rows] == ["None", "6"]
    assert all(float(row[1]) > 0 and float(row[4]) > 100 for row in rows)


def test_pair_cost(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    lines = []
    for i in range(6):
        picture(40 + i, 30, seed=i).save(tmp_path / "images" / f"{i}.png")
        lines.append({"image": f"{i}.png", "captions": [f"scene {i}", f"picture {i}"]})
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    command = [sys.executable, ROOT / "benchmarks" / "pair_cost.py", "--tiny", "--data", tmp_path]
    sizes = ["--batch-size", "2", "--steps", "1"]
    done = subprocess.run([*map(str, command), *sizes], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text, image = table(done.stdout)
    assert (text[0], image[0]) == ("text-text", "image-text")
    for column in (3, 6):
        assert float(text[column]) > 0 and float(image[column]) > 0
    assert "times the FLOPs" in done.stdout
