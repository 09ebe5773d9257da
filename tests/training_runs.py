"""A tiny training run, for the tests that start, kill and compare whole runs."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from hf_models import Recipe, build_text
from orbax.checkpoint import v1 as ocp

from e5v_jax.checkpoints import from_hf
from e5v_jax.nn.layers import LoRAConfig
from e5v_jax.train.config import DataConfig, OptimizerConfig, TrainConfig

ROOT = Path(__file__).parents[1]
ROWS, BATCH, EPOCHS, STEPS = 42, 8, 2, 10
RECIPE = Recipe(
    template="chatml",
    text={
        "vocab_size": 261,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
    },
    seed=12,
)


def write_csv(file: Path, rows: int = ROWS) -> Path:
    lines = [f"dog {i} runs,the dog {i} moves,{i} cats sleep" for i in range(rows)]
    file.write_text("\n".join(["sent0,sent1,hard_neg", *lines]) + "\n")
    return file


def make_folder(folder: Path, **text: int) -> Path:
    """Fill ``folder`` with ``base``, a tiny random converted model, and ``data.csv``."""
    build_text(dataclasses.replace(RECIPE, text={**RECIPE.text, **text}), folder / "hf")
    from_hf.convert(from_hf.Args(str(folder / "hf"), folder / "base"))
    write_csv(folder / "data.csv")
    return folder


def config(folder: Path, output: Path, **changes: Any) -> TrainConfig:
    """A run of ten small steps."""
    cfg = TrainConfig(
        model=folder / "base",
        output=output,
        data=DataConfig(path=(folder / "data.csv",), length_groups=1),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=2),
        lora=LoRAConfig(rank=2, alpha=4.0),
        batch_size=BATCH,
        num_epochs=EPOCHS,
        dtype="float32",
        remat="none",
        log_every=1,
        checkpoint_every=3,
    )
    return dataclasses.replace(cfg, **changes)


def words(folder: Path, output: Path) -> list[str]:
    """The same run from the command line, with dropout: flags over a configuration file."""
    flags: dict[str, object] = {
        "config": ROOT / "configs" / "demo.py",
        "model": folder / "base",
        "output": output,
        "data.path": folder / "data.csv",
        "data.length-groups": 1,
        "optimizer.learning-rate": 3e-3,
        "optimizer.warmup-steps": 2,
        "lora.rank": 2,
        "lora.alpha": 4.0,
        "lora.dropout": 0.1,
        "batch-size": BATCH,
        "remat": "none",
        "checkpoint-every": 3,
    }
    return [str(word) for name, value in flags.items() for word in (f"--{name}", value)]


# Runs the command, and signals it when Python is about to do the given thing to the given path.
SIGNALLED_AT = """
import os, runpy, signal, sys

module, event, end, number = sys.argv[1:5]

left = [int(number)]  # once: Orbax may make a folder in two steps

def hook(name, args):
    if left and name == event and str(args[0]).endswith(end):
        os.kill(os.getpid(), left.pop())

sys.addaudithook(hook)
sys.argv = ["train", *sys.argv[5:]]
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


# Runs the command in a process to which the checkpoint of a step looks damaged.
BLIND_TO = """
import runpy, sys
from orbax.checkpoint import v1 as ocp

step, load = int(sys.argv[1]), ocp.training.Checkpointer.load

def look(self, wanted, *rest):
    loaded = load(self, wanted, *rest)
    if wanted == step:
        raise ValueError("DATA_LOSS: as if cut short")
    return loaded

ocp.training.Checkpointer.load = look
sys.argv = ["train", *sys.argv[2:]]
runpy.run_module("e5v_jax.train", run_name="__main__", alter_sys=True)
"""


def start(
    argv: Sequence[str],
    *,
    cache: Path,
    signal_at: tuple[str, str] | None = None,
    signal_number: int = signal.SIGKILL,
    blind_to: int | None = None,
    env: Mapping[str, str] | None = None,
    module: str = "e5v_jax.train",
) -> subprocess.Popen[str]:
    """``python -m MODULE`` in a process of its own; compiled programs are shared.

    With ``signal_at``, an audit event of Python and the end of its path, it signals itself there;
    with ``blind_to`` it finds the checkpoint of that step damaged.
    """
    program = ["-m", module]
    if signal_at is not None:
        program = ["-c", SIGNALLED_AT, module, *signal_at, str(int(signal_number))]
    if blind_to is not None:
        program = ["-c", BLIND_TO, str(blind_to)]
    return subprocess.Popen(
        [sys.executable, *program, *argv],
        cwd=ROOT,
        env={**os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache), **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def command(argv: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """:func:`start`, and wait for the end."""
    process = start(argv, **options)
    out, err = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def read_metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def read_state(run: Path, step: int) -> list[np.ndarray]:
    """Every array of a checkpoint: parameters and optimizer state."""
    with ocp.training.Checkpointer(run / "checkpoints") as checkpointer:
        return [np.asarray(x) for x in jax.tree.leaves(checkpointer.load(step))]


def assert_same_state(run: Path, expected: Path, step: int) -> None:
    """Both checkpoints have the same bits."""
    for mine, other in zip(read_state(run, step), read_state(expected, step), strict=True):
        assert mine.tobytes() == other.tobytes()


def assert_same_end(run: Path, expected: Path, step: int) -> None:
    """Both runs ended with the same bits: parameters, optimizer state, exported adapter."""
    assert_same_state(run, expected, step)
    weights = "adapter/adapter_model.safetensors"
    assert (run / weights).read_bytes() == (expected / weights).read_bytes()
