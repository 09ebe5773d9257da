"""Adapters by the folder that a user names: PEFT's, a training run's or a checkpoint's of one."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from e5v_jax.checkpoints.converted import WeightSource, is_converted
from e5v_jax.checkpoints.loading import dotted
from e5v_jax.checkpoints.peft import ADAPTER_FILES, Adapter, read_adapter, zero_factors
from e5v_jax.checksums import verify_checksums
from e5v_jax.nn.layers import LoRAConfig, LoRAParam
from e5v_jax.presets import PRESETS
from e5v_jax.storage import absolute, without_wildcards

CHECKPOINTS = "checkpoints"


def read_run_info(run: Path) -> dict[str, Any]:
    """Read ``run.json``; later fields may be missing. Raises ValueError: no ``config.data``."""
    file = run / "run.json"
    try:
        info = json.loads(file.read_text())
    except (ValueError, RecursionError) as error:  # of JSON or of UTF-8
        raise ValueError(f"{file}: not JSON ({error}); restore it from a copy") from error
    match info:
        case {"config": {"data": {}}}:
            return dict(info)
    raise ValueError(f'{file}: expected an object with a run\'s "config"; restore it from a copy')


def lora_of(run: Path, config: dict[str, Any]) -> LoRAConfig | None:
    """A run's ``lora``; None if all weights were trained. Raises ValueError: it cannot be read."""
    try:
        return None if config["lora"] is None else LoRAConfig(**config["lora"])
    except (KeyError, TypeError) as error:
        message = f"{run}/run.json: config.lora cannot be read ({error}); restore it from a copy"
        raise ValueError(message) from error


def read_run_adapter(run: Path, step: int | None, base: WeightSource) -> Adapter:
    """LoRA factors of a run's checkpoint after ``step`` (None: the newest), on the host.

    Raises ValueError: the run trained all weights, there is no such checkpoint, or it is damaged.
    """
    from orbax.checkpoint import v1 as ocp  # takes 0.3 s, which some need not wait for

    lora = lora_of(run, read_run_info(run)["config"])
    if lora is None:
        raise ValueError(f"{run}: this run trained all weights (lora None): it has no adapter")
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    folder = absolute(run / CHECKPOINTS)
    with (
        without_wildcards(folder) as place,
        ocp.training.Checkpointer(place, context=context) as checkpointer,
    ):
        steps = [checkpoint.step for checkpoint in checkpointer.checkpoints]
        if not steps or (step is not None and step not in steps):
            wanted = "" if step is None else f" of step {step}"
            raise ValueError(f"{folder}: no checkpoint{wanted}; found steps {steps}")
        step = steps[-1] if step is None else step
        verify_checksums(folder / str(step))
        zeros = zero_factors(base.table, lora)
        like = nnx.from_flat_state([(tuple(p.split(".")), LoRAParam(x)) for p, x in zeros.items()])
        state = checkpointer.load(step, {"trainable": like})
    values = nnx.to_flat_state(state["trainable"])
    return Adapter(lora, {dotted(path): np.asarray(leaf[...]) for path, leaf in values})


def carried_adapter(folder: Path, base: WeightSource) -> Path | None:
    """The adapter folder in a model folder: a converted one's, or jina-embeddings-v4's own."""
    if is_converted(folder):
        return folder / "adapter" if (folder / "adapter").is_dir() else None
    classes = [preset.architecture for preset in PRESETS.values() if preset.adapter is not None]
    # vectors of the weights alone are not the model's: without that folder it is an error
    return folder / "adapters" if set(classes) & set(base.known_as) else None


def find_run(folder: Path) -> tuple[Path, int | None]:
    """``folder``, or the run and the step that it is a checkpoint of: RUN/checkpoints/STEP."""
    run = absolute(folder)
    if run.parent.name == CHECKPOINTS and run.name.isdigit() and not (run / "run.json").is_file():
        return run.parent.parent, int(run.name)
    return run, None


def load_adapter(folder: Path, base: WeightSource, wanted: str | None = None) -> Adapter:
    """LoRA factors of a PEFT folder, RUN/checkpoints/STEP or RUN (of its end, else the newest).

    ``wanted`` is the one to take of several, see :func:`e5v_jax.checkpoints.peft.read_adapter`.

    Raises:
        FileNotFoundError: neither.
        ValueError: the adapter does not fit the model.
    """
    run, step = find_run(folder)
    if (run / "run.json").is_file():
        if (command := read_run_info(run).get("command", "train")) != "train":
            raise ValueError(
                f"{run}: a run of {command} leaves a model and no adapter: use {run}/model"
            )
        folder = run / "adapter"
        if step is not None or not (folder / ADAPTER_FILES[0]).is_file():
            return read_run_adapter(run, step, base)
    if (folder / ADAPTER_FILES[0]).is_file():
        return read_adapter(folder, base.table, wanted)
    raise FileNotFoundError(
        f"{folder}: neither a PEFT adapter (adapter_config.json) nor a run folder (run.json) or "
        "one of its checkpoints"
    )
