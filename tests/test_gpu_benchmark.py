"""The GPU benchmark runs, at toy size, on any machine; its figures mean nothing there."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "gpu_train.py"


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param([], id="lora", marks=pytest.mark.slow),
        pytest.param(["--quantize", "nf4"], id="qlora", marks=pytest.mark.slow),
        pytest.param(
            ["--chunk-size", "None", "--remat", "offload_dots"],
            id="offload",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_benchmark_at_toy_size(flags: list[str]) -> None:
    sizes = {"batch-size": 8, "chunk-size": 12, "length": 8, "steps": 2}
    words = [f"--{name}={size}" for name, size in sizes.items()]
    done = subprocess.run(
        [sys.executable, BENCHMARK, "--tiny", *words, *flags], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert 0 < result["loss"] < 40  # cosines / 0.05 differ by 40 at most
    tokens = result["tokens_per_second"] * result["step_seconds"]
    assert tokens == pytest.approx(3 * 8 * 8)
    assert result["estimated_peak_bytes"] > 1e6
