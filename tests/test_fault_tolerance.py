"""What pods do to runs: preempted, killed at any moment, checkpoints damaged, another mesh."""

import os
import random
import resource
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from training_runs import (
    STEPS,
    assert_same_end,
    command,
    make_folder,
    read_metrics,
    start,
    words,
    write_csv,
)

FLAGS = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
EIGHT_DEVICES = {"XLA_FLAGS": FLAGS}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def finished(folder: Path, cache: Path) -> Path:
    """The folder of a run that was left alone."""
    done = command(words(folder, folder / "finished"), cache=cache)
    assert done.returncode == 0, done.stderr
    return folder / "finished"


def test_sigterm_saves_and_ends_well(folder: Path, finished: Path, cache: Path) -> None:
    """It arrives while step 3 is saved: step 4 is finished, saved and the last."""
    run = folder / "preempted"
    done = command(
        words(folder, run),
        cache=cache,
        signal_at=("os.mkdir", "/3.orbax-checkpoint-tmp"),
        signal_number=signal.SIGTERM,
    )
    assert done.returncode == 0, done.stderr
    last = int(read_metrics(run)[-1]["step"])
    assert 3 <= last < STEPS
    assert done.stdout.splitlines()[-1] == f"preempted at step {last}; continue with --resume"
    assert (run / "checkpoints" / str(last)).is_dir()
    assert not (run / "adapter").exists()

    done = command([*words(folder, run), "--resume"], cache=cache)
    assert done.returncode == 0, done.stderr
    assert f"from step {last}\n" in done.stdout
    assert_same_end(run, finished, STEPS)


@pytest.mark.parametrize("damage", ["truncated", pytest.param("missing", marks=pytest.mark.slow)])
def test_a_damaged_checkpoint_falls_back(
    folder: Path, finished: Path, cache: Path, damage: str
) -> None:
    run = folder / f"damaged-{damage}"
    killed = command(
        words(folder, run), cache=cache, signal_at=("os.mkdir", "/9.orbax-checkpoint-tmp")
    )
    assert killed.returncode == -signal.SIGKILL
    newest = run / "checkpoints" / "6"
    files = sorted(newest.rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0)
    arrays = [file for file in files if "/d/" in file.as_posix()]  # TensorStore's data files
    assert arrays
    for file in arrays:
        if damage == "missing":
            file.unlink()
        else:
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])

    done = command([*words(folder, run), "--resume"], cache=cache)
    assert done.returncode == 0, done.stderr
    assert "checkpoint of step 6 is damaged (" in done.stderr
    assert "falling back to the one before" in done.stderr
    assert "from step 3\n" in done.stdout
    assert (run / "damaged-6").is_dir()
    assert_same_end(run, finished, STEPS)


@pytest.mark.slow
def test_nothing_whole_is_refused(folder: Path, cache: Path) -> None:
    run = folder / "hopeless"
    argv = words(folder, run)
    command(argv, cache=cache, signal_at=("os.mkdir", "/6.orbax-checkpoint-tmp"))
    for file in (run / "checkpoints" / "3").rglob("*"):
        if "/d/" in file.as_posix():
            file.unlink()
    done = command([*argv, "--resume"], cache=cache)
    assert done.returncode == 1
    warning, error = done.stderr.splitlines()
    assert "checkpoint of step 3 is damaged" in warning and "state/" in warning
    assert error.startswith("error: ") and error.endswith(
        "none of the checkpoints of steps [3] can be read: bring one back from a copy, or start "
        "again with another output"
    )
    assert (run / "checkpoints" / "3").is_dir()


def test_resume_on_another_mesh(tmp_path: Path, cache: Path) -> None:
    """Begun on eight devices, ended on one: fp32 rounding is all that differs."""
    folder = make_folder(tmp_path, vocab_size=264)
    run, expected = tmp_path / "run", tmp_path / "expected"
    mesh = ["--mesh.data", "2", "--mesh.fsdp", "2", "--mesh.tensor", "2"]
    argv = [*words(folder, run), "--lora.dropout", "0.1"]  # whose masks are those of any mesh
    done = command(
        [*argv, *mesh],
        cache=cache,
        signal_at=("os.mkdir", "/9.orbax-checkpoint-tmp"),
        env=EIGHT_DEVICES,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    done = command([*argv, "--resume"], cache=cache)
    assert done.returncode == 0, done.stderr
    assert "from step 6\n" in done.stdout
    done = command([*words(folder, expected), "--lora.dropout", "0.1"], cache=cache)
    assert done.returncode == 0, done.stderr
    ours, theirs = ([line["loss"] for line in read_metrics(x)] for x in (run, expected))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def without_steps(stderr: str) -> list[str]:
    """The lines that are not the progress."""
    return [line for line in stderr.splitlines() if not line.startswith("step ")]


def test_ctrl_c_while_a_checkpoint_is_saved(folder: Path, finished: Path, cache: Path) -> None:
    run = folder / "interrupted"
    done = command(
        words(folder, run),
        cache=cache,
        signal_at=("os.mkdir", "/3.orbax-checkpoint-tmp"),
        signal_number=signal.SIGINT,
    )
    assert (done.returncode, without_steps(done.stderr)) == (130, ["interrupted"])
    assert not (run / "adapter").exists()
    done = command([*words(folder, run), "--resume"], cache=cache)
    assert done.returncode == 0, done.stderr
    # where tidying up takes over ten seconds, it is the next start that does it
    assert not list((run / "checkpoints").glob("*tmp"))
    assert_same_end(run, finished, STEPS)


@pytest.mark.skipif(sys.platform != "linux", reason="limits of another process are Linux's")
def test_a_full_disk_is_one_line(folder: Path, finished: Path, cache: Path) -> None:
    """A limit of the size of files stands for it; no file of a checkpoint's arrays fits in."""
    run = folder / "full"
    process = start(words(folder, run), cache=cache)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (16_000, 16_000))
    _, stderr = process.communicate()
    (error,) = without_steps(stderr)
    assert process.returncode == 1
    assert error == (
        f"error: {run}/checkpoints: cannot write a checkpoint: File too large; those before it are "
        "whole: mend that, then --resume"
    )
    assert not list((run / "checkpoints").iterdir())
    done = command([*words(folder, run), "--resume"], cache=cache)
    assert done.returncode == 0, done.stderr
    assert_same_end(run, finished, STEPS)


@pytest.mark.slow
def test_a_hundred_kills_at_random(folder: Path, cache: Path) -> None:
    """SIGKILL two runs fifty times each at random moments; they end as if nothing had been."""
    write_csv(folder / "long.csv", rows=2400)  # 600 steps

    def argv(run: Path) -> list[str]:
        data = ["--data.path", str(folder / "long.csv"), "--checkpoint-every", "5"]
        return [*words(folder, run), *data]

    expected = folder / "long"
    done = command(argv(expected), cache=cache)
    assert done.returncode == 0, done.stderr
    steps = int(read_metrics(expected)[-1]["step"])

    def kill_often(seed: int) -> list[int]:
        run, rng = folder / f"killed-{seed}", random.Random(seed)
        seen = []
        for kill in range(50):
            before = last_step(run)
            process = start([*argv(run), *(["--resume"] if run.exists() else [])], cache=cache)
            if kill % 4:  # among the steps; else at any moment, most likely before the first
                while last_step(run) <= before and process.poll() is None:
                    time.sleep(0.01)
                time.sleep(rng.uniform(0, 0.6))
            else:
                time.sleep(rng.uniform(0, 10))
            process.kill()
            _, error = process.communicate()
            assert process.returncode == -signal.SIGKILL, error
            seen.append(last_step(run))
        done = command([*argv(run), "--resume"], cache=cache)
        assert done.returncode == 0, done.stderr
        return seen

    with ThreadPoolExecutor(2) as both:
        for seed, seen in enumerate(both.map(kill_often, range(2))):
            assert 20 < seen[-1] < steps, seen
            run = folder / f"killed-{seed}"
            assert_same_end(run, expected, steps)
            ours, theirs = (
                [(x["step"], x["loss"]) for x in read_metrics(r)] for r in (run, expected)
            )
            assert ours == theirs


def last_step(run: Path) -> int:
    """The last step that metrics.jsonl tells of; 0 without any."""
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.is_file() else []
    return max((int(x.split(",")[0].split(":")[1]) for x in lines if x.endswith("}")), default=0)
