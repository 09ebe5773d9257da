"""Damaged outputs and odd flags from seeds, see fuzz_outputs.py, and a hundred kills; -s counts."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from fuzz_outputs import (
    Run,
    Undisturbed,
    contents,
    fuzz_flags,
    fuzz_output,
    undisturbed_runs,
    write_inputs,
)
from hf_models import TEXT_RECIPES, build_text

from e5v_jax import E5V, lock
from e5v_jax.encode.__main__ import main as encode
from e5v_jax.encode.bulk import read_embeddings

if TYPE_CHECKING:
    from hf_models import Case

FAST, ALL = 40, 250  # cases of a kind: in `make test`, and in all


@pytest.fixture(scope="module")
def model(llava: "Callable[[str], Case]") -> E5V:
    return llava("llama-gqa").e5v


@pytest.fixture
def run(
    llava: "Callable[[str], Case]",
    model: E5V,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> Run:
    """The command with the model that is loaded, in an empty folder."""
    monkeypatch.setattr(E5V, "from_pretrained", lambda *_, **__: model)
    monkeypatch.setattr(lock, "_MOMENT", 0.0)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")

    def run(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            encode(["--model", str(llava("llama-gqa").folder), *words])
        assert isinstance(end.value.code, int), end.value.code
        return end.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    (tmp_path / "inputs").mkdir()
    write_inputs(tmp_path / "inputs")
    return tmp_path / "inputs"


def check(cases: range, folder: Path, fuzz: Callable[[np.random.Generator, Path], str]) -> None:
    """Run the cases; those that end badly are listed."""
    outcomes: Counter[str] = Counter()
    bad = []
    for number in cases:
        (folder / "case").mkdir()
        try:
            outcomes[fuzz(np.random.default_rng(number), folder / "case")] += 1
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            bad.append(f"{number}: {where.line}: {type(error).__name__}: {str(error)[:600]}")
        shutil.rmtree(folder / "case")
    print(f"{len(cases)} cases, {', '.join(f'{n} {what}' for what, n in outcomes.items())}")
    assert not bad, "\n".join(bad)
    assert len(outcomes) > 1, "all cases ended alike: what do they try?"


def fuzz_outputs(cases: range, folder: Path, run: Run, inputs: Path) -> None:
    undisturbed: list[Undisturbed] = undisturbed_runs(run, inputs)
    check(cases, folder, lambda rng, case: fuzz_output(rng, case, run, undisturbed))


def test_some_outputs(run: Run, inputs: Path, tmp_path: Path) -> None:
    fuzz_outputs(range(FAST), tmp_path, run, inputs)


def test_some_flags(run: Run, model: E5V, inputs: Path, tmp_path: Path) -> None:
    check(range(FAST), tmp_path, lambda rng, case: fuzz_flags(rng, case, run, model, inputs))


@pytest.mark.slow
def test_all_outputs(run: Run, inputs: Path, tmp_path: Path) -> None:
    fuzz_outputs(range(FAST, ALL), tmp_path, run, inputs)


@pytest.mark.slow
def test_all_flags(run: Run, model: E5V, inputs: Path, tmp_path: Path) -> None:
    check(range(FAST, ALL), tmp_path, lambda rng, case: fuzz_flags(rng, case, run, model, inputs))


# --- killed ---------------------------------------------------------------------------------------


def start(model: Path, rows: Path, output: Path, format: str, cache: Path) -> subprocess.Popen[str]:
    words = ["--model", model, "--input", rows, "--output", output, "--format", format]
    words += ["--dtype", "float32", "--shard-size", "2", "--on-error", "skip"]
    return subprocess.Popen(
        [sys.executable, "-m", "e5v_jax.encode", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache)},
    )


def kill_often(model: Path, folder: Path, format: str, cache: Path, kills: int) -> Counter[str]:
    """Runs killed at any moment, the same command started again, until so many kills found one.

    Whenever a run gets to its end, its output is compared with an undisturbed run's, and the next
    begins anew.
    """
    rng = np.random.default_rng(len(format))
    rows, killed = folder / "rows.jsonl", folder / f"killed-{format}"

    def finish(output: Path) -> float:
        began = time.monotonic()
        process = start(model, rows, output, format, cache)
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        return time.monotonic() - began

    finish(folder / format)  # compiles
    whole = contents(folder / format)
    shutil.rmtree(folder / format)
    seconds = finish(folder / format)
    assert contents(folder / format) == whole
    counts: Counter[str] = Counter()
    while counts["kills"] < kills:
        process = start(model, rows, killed, format, cache)
        # half of them while it writes shards: most of a short run is imports
        before = count_shards(killed)
        if rng.random() < 0.5:
            while process.poll() is None and count_shards(killed) == before:
                time.sleep(0.002)
            time.sleep(rng.uniform(0, seconds / 4))
        else:
            time.sleep(rng.uniform(0, seconds))
        process.kill()
        _, err = process.communicate()
        if process.returncode == -signal.SIGKILL:
            counts["kills"] += 1
            counts["in shards"] += count_shards(killed) > before
            continue
        assert process.returncode == 0, err
        assert contents(killed) == whole
        shutil.rmtree(killed)
        counts["finished"] += 1
    finish(killed)
    assert contents(killed) == whole
    read_embeddings(killed)
    return counts


def count_shards(output: Path) -> int:
    return len(list(output.glob("shard-*.sha256")))


@pytest.mark.slow
def test_a_hundred_kills(tmp_path: Path) -> None:
    """Both formats beside each other, half of the kills each."""
    build_text(TEXT_RECIPES["llama"], tmp_path / "model")
    rows = [{"id": f"row {i}", "text": f"Text {i}." if i % 50 else "</s>"} for i in range(400)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with ThreadPoolExecutor(2) as pool:
        both = [
            pool.submit(kill_often, tmp_path / "model", tmp_path, format, tmp_path / "cache", 50)
            for format in ("parquet", "npy")
        ]
        found = {format: one.result() for format, one in zip(("parquet", "npy"), both, strict=True)}
    print(found)
    assert all(counts["in shards"] >= 10 for counts in found.values()), found
