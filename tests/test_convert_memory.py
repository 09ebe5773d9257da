"""Converting holds one layer, not the model: peak memory of a checkpoint larger than the bound."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "convert_memory.py"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
def test_peak_memory_of_a_conversion(tmp_path: Path) -> None:
    """0.88 GB of weights within 0.94 GB, of which Python and its libraries take 0.5 GB."""
    sizes = ["--layers", "6", "--hidden-size", "1024", "--vocab-size", "32064"]
    limits = ["--shard-gb", "0.3", "--allowance-gb", "0.8", "--folder", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, SCRIPT, *sizes, *limits],
        cwd=SCRIPT.parents[1],
        text=True,
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "checkpoint 0.88 GB" in done.stdout
    assert not list(tmp_path.iterdir())
