"""Training checkpoints: trainable parameters, optimizer state, position in the data.

    RUN/run.json           the resolved configuration and the base model's content hash
    RUN/checkpoints/STEP/  Orbax, written asynchronously and renamed when whole
    RUN/metrics.jsonl      one line every log_every steps

The base model stays where it is; ``run.json`` names it by content hash.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp

from convert.peft import Adapter
from e5v_jax.config import ModelConfig
from e5v_jax.converted import new_folder
from e5v_jax.loading import build, dotted
from e5v_jax.model.layers import LoRAConfig, LoRAParam, Precision
from e5v_jax.train.config import TrainConfig

CHECKPOINTS = "checkpoints"


def check_run_folder(cfg: TrainConfig) -> None:
    """Refuse an output that would be written over. Nothing is created yet.

    Raises:
        FileExistsError: it holds something and ``cfg.resume`` is off.
        ValueError: resuming a folder that is no run.
    """
    if cfg.output.exists() and any(cfg.output.iterdir()):
        if not cfg.resume:
            raise FileExistsError(
                f"{cfg.output}: already exists; pass --resume to continue it, or choose another"
            )
        if not (cfg.output / "run.json").is_file():
            raise ValueError(f"{cfg.output}: cannot resume, there is no run.json in it")


def open_checkpointer(cfg: TrainConfig) -> ocp.training.Checkpointer:
    """The run's Orbax checkpointer; keeps the newest ``cfg.keep_checkpoints``."""
    policies = ocp.training.save_decision_policies
    return ocp.training.Checkpointer(
        (cfg.output / CHECKPOINTS).absolute(),
        save_decision_policy=policies.FixedIntervalPolicy(cfg.checkpoint_every),
        preservation_policy=ocp.training.preservation_policies.LatestN(cfg.keep_checkpoints),
        cleanup_tmp_directories=True,
    )


def save(
    checkpointer: ocp.training.Checkpointer,
    step: int,
    trainable: nnx.State,
    opt_state: optax.OptState,
    iterator_state: dict[str, Any],
    *,
    last: bool = False,
) -> None:
    """Save after ``step`` optimizer steps if it is due (always if ``last``); returns at once."""
    checkpointer.save_async(
        step,
        {"trainable": trainable, "opt_state": opt_state},
        force=last,
        custom_metadata={"iterator": iterator_state},
    )


def abstract(tree: Any, mesh: Mesh) -> Any:
    """Shapes, dtypes and shardings of ``tree``; scalars are replicated over ``mesh``."""
    replicated = NamedSharding(mesh, PartitionSpec())

    def shape(x: jax.Array) -> jax.ShapeDtypeStruct:
        sharding = x.sharding if isinstance(x.sharding, NamedSharding) else replicated
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(shape, tree)


def restore(
    checkpointer: ocp.training.Checkpointer,
    trainable: nnx.State,
    opt_state: optax.OptState,
    mesh: Mesh,
) -> tuple[int, nnx.State, optax.OptState, dict[str, Any]] | None:
    """(step, trainable, opt_state, iterator state) of the newest checkpoint; None without one."""
    latest = checkpointer.latest
    if latest is None:
        return None
    like = abstract({"trainable": trainable, "opt_state": opt_state}, mesh)
    state = checkpointer.load(latest.step, like)
    metadata = checkpointer.metadata(latest.step).custom_metadata
    if not isinstance(metadata, dict) or "iterator" not in metadata:
        raise ValueError(f"checkpoint of step {latest.step}: holds no data-iterator state")
    return latest.step, state["trainable"], state["opt_state"], metadata["iterator"]


def run_info(cfg: TrainConfig, base_hash: str, data_fingerprint: str) -> dict[str, Any]:
    """The contents of ``run.json``."""
    info = {
        "config": dataclasses.asdict(cfg),
        "base_hash": base_hash,
        "data_fingerprint": data_fingerprint,
    }
    plain: dict[str, Any] = json.loads(json.dumps(info, default=str))
    return plain


def check_same_run(run: Path, info: dict[str, Any]) -> None:
    """Refuse to resume with what makes the saved state mean something else. A new run passes.

    Raises:
        ValueError: the run had another model, adapter shape, other data or other batches.
    """
    if not (run / "run.json").is_file():
        return
    before, now = _identity(read_run_info(run)), _identity(info)
    for name, value in now.items():
        if value != before[name]:
            raise ValueError(
                f"{run}: cannot resume: {name} was {before[name]} and is now {value}; "
                "go back to that, or choose another output"
            )


def _identity(info: dict[str, Any]) -> dict[str, Any]:
    config, data = info["config"], info["config"]["data"]
    return {
        "the base model's hash": info["base_hash"],
        "the data's fingerprint": info["data_fingerprint"],
        **{name: config[name] for name in ("lora", "batch_size", "seed")},
        **{f"data.{name}": data[name] for name in ("max_tokens", "prompt", "template")},
    }


def write_run_info(run: Path, info: dict[str, Any]) -> None:
    """Create the run folder with its ``run.json``, or renew that of a resumed run."""
    text = json.dumps(info, indent=1) + "\n"
    if not (run / "run.json").is_file():
        with new_folder(run) as folder:  # so that a run folder always has its run.json
            (folder / "run.json").write_text(text)
        return
    temporary = run / "run.json.tmp"
    temporary.write_text(text)
    temporary.rename(run / "run.json")


def find_run(folder: Path) -> tuple[Path, int | None] | None:
    """(run folder, step) of a run folder (step None: the newest) or a RUN/checkpoints/STEP."""
    folder = Path(folder).absolute()
    if (folder / "run.json").is_file():
        return folder, None
    run = folder.parent.parent
    if folder.parent.name == CHECKPOINTS and folder.name.isdigit() and find_run(run):
        return run, int(folder.name)
    return None


def read_run_info(run: Path) -> dict[str, Any]:
    """Read ``run.json``."""
    info: dict[str, Any] = json.loads((run / "run.json").read_text())
    return info


def read_run_adapter(run: Path, step: int | None, cfg: ModelConfig) -> Adapter:
    """LoRA factors of a run's checkpoint after ``step`` (None: the newest), on the host.

    Raises:
        ValueError: the run trained all weights, or there is no such checkpoint.
    """
    lora_fields = read_run_info(run)["config"]["lora"]
    if lora_fields is None:
        raise ValueError(f"{run}: this run trained all weights (lora None): it has no adapter")
    lora = LoRAConfig(**lora_fields)
    precision = Precision(param=np.float32, compute=np.float32)
    model = jax.eval_shape(lambda: build(cfg, precision=precision, lora=lora, load_vision=False))
    shapes = nnx.split(model, LoRAParam, ...)[1]
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    folder = (run / CHECKPOINTS).absolute()
    with ocp.training.Checkpointer(folder, context=context) as checkpointer:
        steps = [checkpoint.step for checkpoint in checkpointer.checkpoints]
        if not steps or (step is not None and step not in steps):
            wanted = "" if step is None else f" of step {step}"
            raise ValueError(f"{folder}: no checkpoint{wanted}; found steps {steps}")
        like = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), shapes)
        state = checkpointer.load(steps[-1] if step is None else step, {"trainable": like})
    values = nnx.to_flat_state(state["trainable"])
    return Adapter(lora, {dotted(path): np.asarray(leaf[...]) for path, leaf in values})
