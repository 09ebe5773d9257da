"""Two processes (gloo between them) are one run: same losses, parameters and files."""

import json
import shutil
import socket
import subprocess
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from training_runs import STEPS, command, make_folder, read_metrics, start, words

from e5v_jax.checkpoints.adapters import read_run_adapter
from e5v_jax.checkpoints.converted import ConvertedFolder

ARGV = ["--lora.dropout", "0", "--mesh.data", "2", "--mesh.fsdp", "1"]


Done = list[subprocess.CompletedProcess[str]]


def together(
    argv: list[str], cache: Path, blind_to: tuple[int | None, int | None] = (None, None)
) -> Done:
    """The command as process 0 and process 1 of two; each may be ``blind_to`` a checkpoint."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = [
        start(
            argv,
            cache=cache,
            blind_to=blind_to[index],
            env={
                "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": str(index),
            },
        )
        for index in range(2)
    ]
    outputs = [process.communicate(timeout=240) for process in processes]
    return [
        subprocess.CompletedProcess(process.args, process.returncode, *output)
        for process, output in zip(processes, outputs, strict=True)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def expected(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process with one device."""
    done = command(
        [*words(folder, folder / "one"), "--lora.dropout", "0"],
        cache=tmp_path_factory.mktemp("cache"),
    )
    assert done.returncode == 0, done.stderr
    return folder / "one"


@pytest.fixture(scope="module")
def two(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """The run of two processes, in ``folder / "two"``."""
    return together([*words(folder, folder / "two"), *ARGV], tmp_path_factory.mktemp("cache"))


def test_two_processes_are_one_run(folder: Path, expected: Path, two: Done) -> None:
    run = folder / "two"
    first, second = two
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert f"{run / 'adapter'}: written" in first.stdout
    assert second.stdout == ""  # one of them speaks, and of libraries none
    assert "Gloo" not in first.stdout

    metrics = read_metrics(run)
    assert [line["step"] for line in metrics] == list(range(1, STEPS + 1))
    losses = [line["loss"] for line in metrics]
    np.testing.assert_allclose(losses, [x["loss"] for x in read_metrics(expected)], rtol=1e-6)

    weights = "adapter/adapter_model.safetensors"
    ours, theirs = load_file(run / weights), load_file(expected / weights)
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        assert np.abs(ours[name] - value).max() <= 1e-6, name
    assert json.loads((run / "run.json").read_text())["config"]["output"] == str(run)

    # what two processes wrote, one reads
    base = ConvertedFolder(folder / "base")
    two, one = (read_run_adapter(x, STEPS, base).values for x in (run, expected))
    assert set(two) == set(one)
    for name, value in one.items():
        assert np.abs(two[name] - value).max() <= 1e-6, name


@pytest.mark.slow
def test_all_take_the_newest_that_all_can_read(folder: Path, two: Done, tmp_path: Path) -> None:
    assert [process.returncode for process in two] == [0, 0]
    run = tmp_path / "run"
    shutil.copytree(folder / "two", run)
    shutil.rmtree(run / "adapter")
    argv = [*words(folder, run), *ARGV, "--resume"]
    first, second = together(argv, tmp_path, blind_to=(None, STEPS))
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    damaged = f"checkpoint of step {STEPS} is damaged ("
    assert f"{damaged}another process cannot read it): falling back" in first.stderr
    assert f"{damaged}DATA_LOSS: as if cut short): falling back" in second.stderr
    assert f"from step {STEPS - 1}\n" in first.stdout
    assert (run / f"damaged-{STEPS}").is_dir()
    # to the bits of the run that never stopped
    weights = "adapter/adapter_model.safetensors"
    assert (run / weights).read_bytes() == (folder / "two" / weights).read_bytes()


def test_a_process_alone_says_what_it_lacks(folder: Path, tmp_path: Path) -> None:
    done = command([*words(folder, tmp_path / "run"), "--distributed"], cache=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: cannot find the other processes: ")
    assert done.stderr.rstrip().endswith(
        "Set JAX_COORDINATOR_ADDRESS (host:port), JAX_NUM_PROCESSES and JAX_PROCESS_ID"
    )
    assert not (tmp_path / "run").exists()
