"""The load benchmark's checked part, on a random tiny model."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

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
