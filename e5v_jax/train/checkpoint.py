"""Training checkpoints: trainable parameters, optimizer state, position in the data.

They are in RUN/checkpoints/STEP, written by Orbax asynchronously and renamed when whole. The base
model stays where it is; ``run.json`` names it by content hash.
"""

import json
import logging
from collections.abc import Callable
from functools import partial
from json import JSONDecodeError
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
import optax
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp

from e5v_jax.checkpoints.adapters import CHECKPOINTS
from e5v_jax.distributed import is_first, wait_for_all
from e5v_jax.storage import absolute, as_path, remove_folder
from e5v_jax.train.config import TrainConfig
from e5v_jax.train.optimizer import as_saved, carry_over, implied_accumulation

_logger = logging.getLogger(__name__)
SCORE = "stsb_dev"
_T = TypeVar("_T")


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
    accumulate_steps: int = 1,
    last: bool = False,
    score: float | None = None,
) -> None:
    """Save after ``step`` steps if it is due (always if ``last``); returns at once."""
    checkpointer.save_async(
        step,
        {"trainable": trainable, "opt_state": opt_state},
        force=last,
        metrics=None if score is None else {SCORE: score},
        custom_metadata={"iterator": iterator_state, "accumulate_steps": accumulate_steps},
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
    *,
    accumulate_steps: int = 1,
) -> Restored | None:
    """The newest checkpoint that every process can read, whatever mesh it was written on.

    ``opt_state`` is the fresh state of this run's optimizer, which accumulates over
    ``accumulate_steps``; a state saved with another number is converted (:func:`carry_over`).
    Damaged checkpoints are moved out of the way, to RUN/damaged-STEP, once all processes agree on
    an older one; without any checkpoint the result is None.

    Raises:
        ValueError: there are checkpoints and none is whole; or the newest could not be read for
            another reason than damage, or does not fit this run: it stays where it is.
    """
    steps = {checkpoint.step for checkpoint in checkpointer.checkpoints}
    damaged: list[int] = []
    while True:
        mine = max(steps.difference(damaged), default=-1)
        step = int(_of_all_processes(mine).max())
        if step < 0:
            break
        folder = as_path(checkpointer.directory) / str(step)
        found, error, worst = _together(
            partial(_examine, checkpointer, step, trainable, opt_state, mesh)
        )
        stored: Any = None
        if found is not None and worst == _WHOLE:
            stored, error, worst = _together(partial(_load_alone, checkpointer, step, found.like))
        reason = "another process cannot read it" if error is None else _reason(error)
        if worst == _UNREADABLE:
            raise ValueError(
                f"{folder}: {reason}; it stays as it is: mend that, then --resume"
            ) from error
        if found is not None and worst == _WHOLE:
            _set_aside(checkpointer, damaged)
            saved, position = stored["opt_state"], found.position
            before = position.get("accumulate_steps") or implied_accumulation(
                saved, step, accumulate_steps
            )
            carried = carry_over(saved, opt_state, step=step, before=before, now=accumulate_steps)
            return Restored(step, stored["trainable"], carried, position["iterator"])
        _logger.warning(
            "checkpoint of step %d is damaged (%s): falling back to the one before", step, reason
        )
        damaged.append(step)
    if damaged:
        raise ValueError(
            f"{checkpointer.directory}: none of the checkpoints of steps {sorted(damaged)} can be "
            "read"
        )
    return None


_WHOLE, _DAMAGED, _UNREADABLE = range(3)


def _of_all_processes(value: int) -> np.ndarray:
    """The ``value`` of every process, int32 [processes]."""
    return np.ravel(multihost_utils.process_allgather(np.int32(value)))


def _together(action: Callable[[], _T]) -> tuple[_T | None, BaseException | None, int]:
    """(result, error, worst verdict of all processes) of what each of them does alone."""
    result, error, verdict = None, None, _WHOLE
    try:
        result = action()
    except Exception as caught:  # any of many types: _is_damage tells them apart
        error = _root(caught)
        verdict = _DAMAGED if _is_damage(error) else _UNREADABLE
    return result, error, int(_of_all_processes(verdict).max())


def _root(error: BaseException) -> BaseException:
    """What Orbax reports as its cause: it raises a KeyError of its own for everything."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _reason(error: BaseException) -> str:
    """The message in one line, without the details that TensorStore appends in brackets."""
    message = str(error).strip() or type(error).__name__
    return message.split("\n")[0].split(" [")[0][:1000]


def _is_damage(error: BaseException) -> bool:
    """Whether files are missing, cut short or not what was written, as against out of reach.

    TensorStore begins its messages with a status: for network, permissions and memory another one.
    """
    if isinstance(error, FileNotFoundError | JSONDecodeError | UnicodeDecodeError):
        return True
    if isinstance(error, ocp.errors.InvalidLayoutError):  # no arrays, or no description of them
        return True
    return str(error).startswith(("DATA_LOSS:", "NOT_FOUND:", "OUT_OF_RANGE:"))


class _Examined(NamedTuple):
    like: dict[str, Any]  # what to load it into
    position: dict[str, Any]


def _examine(
    checkpointer: ocp.training.Checkpointer,
    step: int,
    trainable: nnx.State,
    opt_state: optax.OptState,
    mesh: Mesh,
) -> _Examined:
    """What a checkpoint says of itself, before any array is read.

    Raises:
        ValueError: the arrays are not those of this run.
        Exception: of Orbax, about anything else.
    """
    if step not in [checkpoint.step for checkpoint in checkpointer.checkpoints]:
        raise OSError("other processes see it, this one does not; all must share a storage")
    metadata = checkpointer.metadata(step)
    position = metadata.custom_metadata or {}
    if "iterator" not in position:  # of an unreadable file Orbax only logs why
        json.loads((as_path(metadata.path) / "_CHECKPOINT_METADATA").read_text())
        raise ValueError("it does not say where in the data it stands; it is of no training")
    saved = metadata.metadata or {}  # of an unreadable one the load says why
    opt_state = as_saved(saved.get("opt_state"), opt_state, trainable)
    like = abstract({"trainable": trainable, "opt_state": opt_state}, mesh)
    found, wanted = _shapes(saved), _shapes(like)
    for name in sorted(found.keys() | wanted.keys()) if saved else ():
        if found.get(name) != wanted.get(name):
            raise ValueError(
                f"{name} has shape {found.get(name)} in it and {wanted.get(name)} in this run "
                "(None is missing); go back to the model and recipe it was begun with"
            )
    return _Examined(like, position)


def _load_alone(checkpointer: ocp.training.Checkpointer, step: int, like: dict[str, Any]) -> Any:
    """The arrays, read without waiting for other processes: one that fails leaves none waiting.

    Orbax counts loads, and saves wait for each other by that number: all processes must call this
    or none.
    """
    context, process = ocp.Context(), jax.process_index()
    context.multiprocessing.primary_host = process
    context.multiprocessing.active_processes = {process}
    context.multiprocessing.barrier_sync_key_prefix = f"process-{process}"
    with context:
        return checkpointer.load(step, like)


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): x.shape for path, x in leaves}


def _set_aside(checkpointer: ocp.training.Checkpointer, damaged: list[int]) -> None:
    """Move checkpoints to RUN/damaged-STEP; all processes have stopped reading them."""
    if not damaged:
        return
    folder = as_path(checkpointer.directory)
    for step in damaged if is_first() else ():
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
