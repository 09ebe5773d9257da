"""Training checkpoints: trainable parameters, optimizer state, position in the data.

    RUN/run.json           the resolved configuration and the base model's content hash
    RUN/checkpoints/STEP/  Orbax, written asynchronously and renamed when whole
    RUN/metrics.jsonl      one line every log_every steps

The base model stays where it is; ``run.json`` names it by content hash.
"""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp

from e5v_jax.converted import new_folder
from e5v_jax.distributed import is_first, wait_for_all
from e5v_jax.run_folder import CHECKPOINTS, read_run_info
from e5v_jax.storage import absolute, as_path, remove_folder, write_whole
from e5v_jax.train.config import TrainConfig

_logger = logging.getLogger(__name__)
SCORE = "stsb_dev"


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
    """The run's Orbax checkpointer; keeps the newest ``cfg.keep_checkpoints``, and the best."""
    policies = ocp.training.save_decision_policies
    kept = ocp.training.preservation_policies
    preservation: list[Any] = [kept.LatestN(cfg.keep_checkpoints)]
    if cfg.evaluation.data is not None:
        best = kept.BestN(
            n=1, get_metric_fn=lambda m: m[SCORE], keep_checkpoints_without_metrics=False
        )
        preservation.append(best)
    return ocp.training.Checkpointer(
        absolute(cfg.output / CHECKPOINTS),
        save_decision_policy=policies.FixedIntervalPolicy(cfg.checkpoint_every),
        preservation_policy=kept.AnyPreservationPolicy(preservation),
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
    score: float | None = None,
) -> None:
    """Save after ``step`` steps if it is due (always if ``last``); returns at once."""
    checkpointer.save_async(
        step,
        {"trainable": trainable, "opt_state": opt_state},
        force=last,
        metrics=None if score is None else {SCORE: score},
        custom_metadata={"iterator": iterator_state},
    )


def abstract(tree: Any, mesh: Mesh) -> Any:
    """Shapes, dtypes and shardings of ``tree``; scalars are replicated over ``mesh``."""
    replicated = NamedSharding(mesh, PartitionSpec())

    def shape(x: jax.Array) -> jax.ShapeDtypeStruct:
        sharding = x.sharding if isinstance(x.sharding, NamedSharding) else replicated
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(shape, tree)


class Restored(NamedTuple):
    """A checkpoint's contents, placed like the arrays it was asked for with."""

    step: int
    trainable: nnx.State
    opt_state: optax.OptState
    iterator_state: dict[str, Any]


def restore(
    checkpointer: ocp.training.Checkpointer,
    trainable: nnx.State,
    opt_state: optax.OptState,
    mesh: Mesh,
) -> Restored | None:
    """The newest whole checkpoint, whatever mesh it was written on; None without any.

    A damaged one is moved out of the way, to RUN/damaged-STEP, and said so.

    Raises:
        ValueError: there are checkpoints, and none is whole.
    """
    like = abstract({"trainable": trainable, "opt_state": opt_state}, mesh)
    steps = [checkpoint.step for checkpoint in checkpointer.checkpoints]
    for step in reversed(steps):
        try:
            state = checkpointer.load(step, like)
            metadata = checkpointer.metadata(step).custom_metadata
            position = metadata["iterator"]
        except Exception as error:  # Orbax and TensorStore raise many types for a damaged file
            _logger.warning(
                "checkpoint of step %d is damaged (%s): falling back to the one before",
                step,
                str(error).strip().split("\n")[0][:200],
            )
            continue
        _set_aside(checkpointer, [s for s in steps if s > step])
        return Restored(step, state["trainable"], state["opt_state"], position)
    if steps:
        raise ValueError(
            f"{checkpointer.directory}: none of the checkpoints of steps {steps} can be read"
        )
    return None


def _set_aside(checkpointer: ocp.training.Checkpointer, damaged: list[int]) -> None:
    if not damaged:
        return
    wait_for_all("restored")  # before the first process moves what another still reads
    for step in damaged:
        folder = as_path(checkpointer.directory)
        if is_first():
            target = folder.parent / f"damaged-{step}"
            remove_folder(target)
            (folder / str(step)).rename(target)
    wait_for_all("damaged checkpoints moved")
    checkpointer.reload()


def load_best(
    checkpointer: ocp.training.Checkpointer, trainable: nnx.State, mesh: Mesh
) -> tuple[int, float, nnx.State] | None:
    """(step, score, trainable) of the best checkpoint; None if none has a score."""
    checkpointer.wait()
    scored = [(c.metrics[SCORE], c.step) for c in checkpointer.checkpoints if c.metrics]
    if not scored:
        return None
    score, step = max(scored)
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    with context:
        state = checkpointer.load(step, abstract({"trainable": trainable}, mesh))
    return step, score, state["trainable"]


def run_info(cfg: TrainConfig, base_hash: str, data_fingerprint: str) -> dict[str, Any]:
    """The contents of ``run.json``."""
    info = {
        "config": dataclasses.asdict(cfg),
        "base_hash": base_hash,
        "data_fingerprint": data_fingerprint,
    }
    plain: dict[str, Any] = json.loads(json.dumps(info, default=str))
    return plain


def check_same_run(run: Path, info: dict[str, Any], *, allowed: tuple[str, ...] = ()) -> None:
    """Refuse to resume with what makes the saved state mean something else. A new run passes.

    ``allowed`` names fields that may differ all the same.

    Raises:
        ValueError: a field that differs, or one of ``allowed`` that is none.
    """
    if not (run / "run.json").is_file():
        return
    before, now = _identity(read_run_info(run)), _identity(info)
    for name in allowed:
        if name not in now or name == "lora":  # the saved arrays would not fit
            fields = ", ".join(x for x in now if x != "lora")
            raise ValueError(f"--allow-change {name}: expected one of {fields}")
    for name, value in now.items():
        if value != before[name] and name not in allowed:
            raise ValueError(
                f"{run}: cannot resume: {name} was {before[name]} and is now {value}; "
                "go back to that, or choose another output"
                + ("" if name == "lora" else f", or accept it with --allow-change {name}")
            )


_IDENTITY = ("lora", "batch_size", "num_epochs", "max_steps", "seed", "quantize")


def _identity(info: dict[str, Any]) -> dict[str, Any]:
    config, data = info["config"], info["config"]["data"]
    return {
        "base_hash": info["base_hash"],
        "data_fingerprint": info["data_fingerprint"],
        **{name: config[name] for name in _IDENTITY},
        **{f"data.{name}": data[name] for name in ("max_tokens", "prompt", "template")},
        **{f"loss.{name}": value for name, value in config["loss"].items()},
        **{f"optimizer.{name}": value for name, value in config["optimizer"].items()},
    }


def write_run_info(run: Path, info: dict[str, Any]) -> None:
    """Create the run folder with its ``run.json``, or renew that of a resumed run."""
    if is_first():
        text = json.dumps(info, indent=1) + "\n"
        if not (run / "run.json").is_file():
            with new_folder(run) as folder:  # so that a run folder always has its run.json
                (folder / "run.json").write_text(text)
        else:
            write_whole(run / "run.json", lambda file: file.write(text.encode()))
    wait_for_all("run.json")
