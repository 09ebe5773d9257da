"""The encoding benchmarks run, at tiny size: what needs a GPU is not left untried."""

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]


def run(name: str, *flags: str | Path) -> str:
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / name, *map(str, flags)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_gpu_benchmark_at_tiny_size() -> None:
    flags = ["--text-batch", "3", "--image-batch", "1", "--repetitions", "1"]
    out = run("encode_gpu.py", "--tiny", "--peak-tflops", "1", *flags)
    rows = [line.split(" | ") for line in out.splitlines() if line.startswith("| ")][1:]
    assert [row[0] for row in rows] == [
        f"| {side}, {kind}" for side in ("e5v-jax", "transformers") for kind in ("texts", "images")
    ]
    assert all(float(row[2]) > 0 for row in rows)


def test_flops_are_those_of_the_design() -> None:
    """36.4 TFLOP for a 640x480 image and its prompt, 0.56 for 40 tokens."""
    code = (
        "from encode_gpu import *; cfg = architecture(Args());"
        "print(model_flops(cfg, 'images') / 1e12, model_flops(cfg, 'texts') / 1e12)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT / "benchmarks",
        capture_output=True,
        text=True,
        check=True,
    )
    images, texts = map(float, done.stdout.split())
    assert abs(images - 36.4) < 1.5 and abs(texts - 0.56) < 0.01


@pytest.mark.slow
def test_profile_of_images_at_tiny_size(tmp_path: Path) -> None:
    """It takes every part out; times of so small a model mean nothing."""
    Image.new("RGB", (60, 40), "teal").save(tmp_path / "one.jpg")
    out = run("image_profile.py", "--images", tmp_path, "--tiny", "--repetitions", "1")
    rows = [line.split(" | ") for line in out.splitlines() if line.startswith("| ")][1:]
    assert [row[0] for row in rows] == [
        "| attention of the decoder",
        "| attention of the tower",
        "| linear maps and all else",
    ]
