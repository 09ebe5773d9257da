"""Going on from a checkpoint: the newest that every process can read, on whatever mesh."""

import json
import logging
from collections.abc import Callable
from functools import partial
from json import JSONDecodeError
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
import optax
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jax.tree_util import keystr, tree_leaves_with_path
from orbax.checkpoint import v1 as ocp

from e5v_jax.checksums import CHECKSUMS, DamagedFileError, verify_checksums
from e5v_jax.storage import as_path
from e5v_jax.train.checkpoint import Checkpoints
from e5v_jax.train.optimizer import as_saved, carry_over
from e5v_jax.train.step import all_finite

_logger = logging.getLogger(__name__)
_T = TypeVar("_T")
_BAD_FILE = FileNotFoundError | JSONDecodeError | UnicodeDecodeError | DamagedFileError
_NO_ARRAYS = ocp.errors.InvalidLayoutError  # or no description of them


class Restored(NamedTuple):
    """A checkpoint's contents, placed like the arrays it was asked for with."""

    step: int
    trainable: nnx.State
    opt_state: optax.OptState
    iterator_state: dict[str, Any]


def restore(
    checkpoints: Checkpoints,
    trainable: nnx.State,
    opt_state: optax.OptState,
    mesh: Mesh,
    *,
    accumulate_steps: int = 1,
) -> Restored | None:
    """Read the newest checkpoint that every process can read, whatever mesh it was written on.

    Its files are compared with their checksums first. ``opt_state`` is this run's fresh state; one
    saved with other ``accumulate_steps`` is converted (:func:`carry_over`). Damaged checkpoints,
    and those whose parameters are not finite, are moved to RUN/damaged-STEP, once all processes
    agree on an older one; without any checkpoint the result is None.

    Raises ValueError: there are checkpoints and none is whole; or the newest could not be read for
    another reason than damage, or does not fit this run: it stays where it is.
    """
    folder = checkpoints.folder
    fresh = {"trainable": trainable, "opt_state": opt_state}
    steps = set(checkpoints.steps)
    damaged: list[int] = []
    while (step := _largest(max(steps.difference(damaged), default=-1))) >= 0:
        try:
            read = partial(_together, folder / str(step))  # in all processes or none
            like, position = read(partial(_examine, checkpoints, step, fresh, mesh))
            stored = read(partial(_load_alone, checkpoints.orbax, step, like))
            if not all_finite(stored["trainable"]):
                raise _DamagedError("its parameters are not finite")
        except _DamagedError as error:
            _logger.warning(
                "checkpoint of step %d is damaged (%s): falling back to the one before", step, error
            )
            damaged.append(step)
            continue
        if damaged:  # all processes have stopped reading them
            checkpoints.set_aside(damaged, "damaged")
        saved, before = stored["opt_state"], position.get("accumulate_steps")
        carried = carry_over(saved, opt_state, step=step, before=before, now=accumulate_steps)
        return Restored(step, stored["trainable"], carried, position["iterator"])
    if damaged:
        tried = sorted(damaged)
        raise ValueError(
            f"{folder}: none of the checkpoints of steps {tried} can be read: bring one back from "
            "a copy, or start again with another output"
        )
    return None


def _largest(value: int) -> int:
    """Compare the ``value`` of every process."""
    return int(np.max(multihost_utils.process_allgather(np.int32(value))))


class _DamagedError(Exception):
    """Files of a checkpoint are missing, cut short or not what was written."""


_WHOLE, _DAMAGED, _UNREADABLE = range(3)


def _together(folder: Path, read: Callable[[], _T]) -> _T:
    """Return what this process reads of a checkpoint, if every process can read it.

    Raises _DamagedError: it is damaged for this or another process; ValueError: it fails otherwise.
    """
    error: BaseException | None = None
    verdict, reason = _WHOLE, "another process cannot read it"
    try:
        result = read()
    except Exception as caught:  # of many types
        error = caught
        # for everything, Orbax raises a KeyError of its own
        while error.__cause__ is not None and not isinstance(error, DamagedFileError):
            error = error.__cause__
        # in one line, without the details that TensorStore appends in brackets
        reason = (str(error).strip() or type(error).__name__).split("\n")[0].split(" [")[0][:1000]
        # TensorStore begins with a status: another one for network, permissions and memory
        lost = str(error).startswith(("DATA_LOSS:", "NOT_FOUND:", "OUT_OF_RANGE:"))
        damage = lost or isinstance(error, _BAD_FILE | _NO_ARRAYS)
        verdict = _DAMAGED if damage else _UNREADABLE
    worst = _largest(verdict)
    if worst == _UNREADABLE:
        reason = f"{reason}; it stays as it is: mend that, then --resume"
        raise ValueError(f"{folder}: {reason}") from error
    if worst == _DAMAGED:
        raise _DamagedError(reason)
    return result


def _examine(
    checkpoints: Checkpoints, step: int, fresh: dict[str, Any], mesh: Mesh
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Find what to load a checkpoint into, and its own metadata, before any array is read.

    The processes share the files to hash. It raises what Orbax does, DamagedFileError, and a
    ValueError if the arrays are not those of this run.
    """
    folder, part, parts = checkpoints.folder / str(step), jax.process_index(), jax.process_count()
    if step not in checkpoints.steps:
        raise OSError("other processes see it, this one does not; all must share a storage")
    if not verify_checksums(folder, part=part, parts=parts) and part == 0:
        _logger.warning(
            "%s: no %s, so a flipped byte would not be noticed (it was killed before they were "
            "written, or is of an older version)",
            *(folder, CHECKSUMS),
        )
    metadata = checkpoints.orbax.metadata(step)
    position = metadata.custom_metadata or {}
    if "iterator" not in position:  # of an unreadable file Orbax only logs why
        json.loads((as_path(metadata.path) / "_CHECKPOINT_METADATA").read_text())
        raise ValueError("it does not say where in the data it stands; it is of no training")
    saved = metadata.metadata or {}  # of an unreadable one the load says why
    opt_state = as_saved(saved.get("opt_state"), fresh["opt_state"], fresh["trainable"], mesh)
    like = {**fresh, "opt_state": opt_state}
    found, wanted = (
        {keystr(path, simple=True, separator="."): x.shape for path, x in leaves}
        for leaves in map(tree_leaves_with_path, (saved, like))
    )
    for name in sorted(found.keys() | wanted.keys()) if saved else ():
        if found.get(name) != wanted.get(name):
            raise ValueError(
                f"{name} has shape {found.get(name)} in it and {wanted.get(name)} in this run "
                "(None is missing); go back to the model and recipe it was begun with"
            )
    return like, position


def _load_alone(checkpointer: ocp.training.Checkpointer, step: int, like: dict[str, Any]) -> Any:
    """Read the arrays without waiting for other processes: one that fails leaves none waiting.

    All must call this or none: Orbax counts loads, and saves wait for each other by that number.
    """
    context, process = ocp.Context(), jax.process_index()
    context.multiprocessing.primary_host = process
    context.multiprocessing.active_processes = {process}
    context.multiprocessing.barrier_sync_key_prefix = f"process-{process}"
    with context:
        return checkpointer.load(step, like)
