"""Reading what a training run left: its ``run.json`` and the LoRA factors of its checkpoints."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from orbax.checkpoint import v1 as ocp

from convert.peft import Adapter
from e5v_jax.config import ModelConfig
from e5v_jax.loading import build, dotted
from e5v_jax.model.layers import LoRAConfig, LoRAParam, Precision
from e5v_jax.storage import absolute

CHECKPOINTS = "checkpoints"


def find_run(folder: Path) -> tuple[Path, int | None] | None:
    """(run folder, step) of a run folder (step None) or a RUN/checkpoints/STEP."""
    folder = absolute(folder)
    if (folder / "run.json").is_file():
        return folder, None
    run = folder.parent.parent
    if folder.parent.name == CHECKPOINTS and folder.name.isdigit() and find_run(run):
        return run, int(folder.name)
    return None


def read_run_info(run: Path) -> dict[str, Any]:
    """Read ``run.json``. Fields that came later than the run may be missing.

    Raises:
        ValueError: the file is no JSON object with a ``config`` and, in it, ``data``.
    """
    file = run / "run.json"
    try:
        info = json.loads(file.read_text())
    except ValueError as error:  # of JSON or of UTF-8
        raise ValueError(f"{file}: not JSON ({error}); restore it from a copy") from error
    match info:
        case {"config": {"data": {}}}:
            fields: dict[str, Any] = info
            return fields
    raise ValueError(f'{file}: expected an object with a run\'s "config"; restore it from a copy')


def lora_of(run: Path, config: dict[str, Any]) -> LoRAConfig | None:
    """The ``lora`` of a run's configuration; None trained all weights.

    Raises:
        ValueError: there is none, or its fields are not those of a :class:`LoRAConfig`.
    """
    try:
        return None if config["lora"] is None else LoRAConfig(**config["lora"])
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{run / 'run.json'}: config.lora cannot be read ({error}); restore it from a copy"
        ) from error


def read_run_adapter(run: Path, step: int | None, cfg: ModelConfig) -> Adapter:
    """LoRA factors of a run's checkpoint after ``step`` (None: the newest), on the host.

    Raises:
        ValueError: the run trained all weights, or there is no such checkpoint.
    """
    lora = lora_of(run, read_run_info(run)["config"])
    if lora is None:
        raise ValueError(f"{run}: this run trained all weights (lora None): it has no adapter")
    precision = Precision(param=np.float32, compute=np.float32)
    model = jax.eval_shape(lambda: build(cfg, precision=precision, lora=lora, load_vision=False))
    shapes = nnx.split(model, LoRAParam, ...)[1]
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    folder = absolute(run / CHECKPOINTS)
    with ocp.training.Checkpointer(folder, context=context) as checkpointer:
        steps = [checkpoint.step for checkpoint in checkpointer.checkpoints]
        if not steps or (step is not None and step not in steps):
            wanted = "" if step is None else f" of step {step}"
            raise ValueError(f"{folder}: no checkpoint{wanted}; found steps {steps}")
        like = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), shapes)
        state = checkpointer.load(steps[-1] if step is None else step, {"trainable": like})
    values = nnx.to_flat_state(state["trainable"])
    return Adapter(lora, {dotted(path): np.asarray(leaf[...]) for path, leaf in values})
