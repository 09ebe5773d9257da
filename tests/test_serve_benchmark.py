"""The load benchmark's checked part, and wrk's, on random tiny models."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from training_runs import make_folder

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_mixed_load(sts_data: Path, tmp_path: Path) -> None:
    flags = ["--parts", "mixed", "--mixed-seconds", "6", "--log", str(tmp_path / "log")]
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks/serve.py", "--sentences", sts_data, *flags],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "\nwrong: 0 []; broken off: 0\n" in done.stdout
    counts = re.search(r"right vectors: (.*);", done.stdout)
    assert counts is not None and all(
        kind in counts[1] for kind in ("images", "messages", "one text", "texts")
    )


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("wrk") is None, reason="wrk is not installed (apt install wrk)")
def test_wrk(sts_data: Path, tmp_path: Path) -> None:
    """It counts answers at both loads, and none is refused."""
    model = make_folder(tmp_path / "of") / "base"
    flags = ["--limit", "8", "--seconds", "2", "--repetitions", "1", "--connections", "1", "8"]
    flags += ["--warm-up-text", "256"]  # of this tokenizer's, which are bytes
    done = subprocess.run(
        [
            sys.executable,
            ROOT / "benchmarks/serve_wrk.py",
            "--sentences",
            sts_data,
            *flags,
            "--model",
            model,
            "--log",
            tmp_path / "log",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"\| (\d+) \| server \| ([\d.]+) \| .* \| 0, 0 \|", done.stdout)
    assert [row[0] for row in rows] == ["1", "8"], done.stdout
    assert all(float(row[1]) > 0 for row in rows), done.stdout
