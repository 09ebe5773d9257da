"""Training checkpoints: trainable parameters, optimizer state, position in the data.

They are in RUN/checkpoints/STEP, written by Orbax asynchronously and renamed when whole; then the
checksums of their files are written beside them. The base model stays where it is; ``run.json``
names it by content hash.
"""

import logging
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optax
from flax import nnx
from orbax.checkpoint import v1 as ocp

from e5v_jax.checkpoints.adapters import CHECKPOINTS
from e5v_jax.checksums import DamagedFileError, verify_checksums, write_checksums
from e5v_jax.distributed import is_first, wait_for_all
from e5v_jax.exits import full_disk
from e5v_jax.storage import absolute, in_bucket, remove_folder, without_wildcards
from e5v_jax.train.config import RunConfig

_logger = logging.getLogger(__name__)
_METADATA = "_CHECKPOINT_METADATA"  # Orbax's: scores, position in the data


@dataclass(frozen=True)
class Score:
    """By what the best checkpoint of a run is told."""

    name: str  # in metrics and checkpoints
    label: str  # for people
    sign: int = 1  # -1: less is better


STSB_DEV = Score("stsb_dev", "STS-B dev")


@dataclass
class Checkpoints:
    """The checkpoints of a run, of which one at a time is being written in the background."""

    folder: Path  # RUN/checkpoints
    orbax: ocp.training.Checkpointer
    score: Score
    _hashing: ThreadPoolExecutor
    _hashed: list[Future[None]] = field(default_factory=list)

    @property
    def steps(self) -> list[int]:
        """The steps that there are, ascending."""
        return sorted(checkpoint.step for checkpoint in self.orbax.checkpoints)

    def save(
        self,
        step: int,
        trainable: nnx.State,
        opt_state: optax.OptState,
        iterator_state: dict[str, Any],
        *,
        accumulate_steps: int = 1,
        last: bool = False,
        score: float | None = None,
    ) -> None:
        """Save after ``step`` steps if it is due (always if ``last``); return at once.

        Raises OSError: it, or the one before, cannot be written; those that are whole stay.
        """
        with _told(self.folder):
            response = self.orbax.save_async(
                step,
                {"trainable": trainable, "opt_state": opt_state},
                force=last,
                metrics=None if score is None else {self.score.name: score},
                custom_metadata={"iterator": iterator_state, "accumulate_steps": accumulate_steps},
            )
        if response is not None:
            self._hashed.append(self._hashing.submit(self._finish, response, step))

    def wait(self) -> None:
        """Return when all that was saved is whole, checksums included. Raises as :meth:`save`."""
        with _told(self.folder):
            self.orbax.wait()
            while self._hashed:
                self._hashed.pop().result()

    def set_aside(self, steps: list[int], name: str) -> None:
        """Move checkpoints to RUN/NAME-STEP, in place of an earlier one; in all processes."""
        for step in steps if is_first() else ():
            _set_aside(self.folder / str(step), name)
        wait_for_all(f"{name} checkpoints moved")
        self.orbax.reload()

    def load_best(self, trainable: nnx.State) -> tuple[int, float, nnx.State] | None:
        """Load the best whole checkpoint: (step, score, trainable); None if none has a score."""
        self.wait()
        name, sign = self.score.name, self.score.sign
        scored = [(sign * c.metrics[name], c.step) for c in self.orbax.checkpoints if c.metrics]
        context = ocp.Context()
        context.pytree.loading.partial_load = True
        for signed, step in sorted(scored, reverse=True):
            try:
                verify_checksums(self.folder / str(step))
            except DamagedFileError as error:
                _logger.warning("checkpoint of step %d is damaged (%s): not the best", step, error)
                continue
            with context:
                state = self.orbax.load(step, {"trainable": trainable})
            return step, sign * signed, state["trainable"]
        return None

    def _finish(self, response: Any, step: int) -> None:
        """Write checksums once a checkpoint is whole, in the first process."""
        try:
            response.result()
        except Exception:  # who waits for Orbax hears of it
            return
        if is_first():
            with suppress(FileNotFoundError):  # newer ones have replaced it meanwhile
                write_checksums(self.folder / str(step))


@contextmanager
def open_checkpoints(cfg: RunConfig, score: Score = STSB_DEV) -> Iterator[Checkpoints]:
    """Open the run's checkpoints; the newest ``cfg.keep_checkpoints`` are kept, and the best.

    At the end of the block all are whole. Raises OSError: one could not be written.
    """
    kept = ocp.training.preservation_policies
    latest = kept.LatestN(cfg.keep_checkpoints)
    best = kept.BestN(
        n=1,
        get_metric_fn=lambda metrics: score.sign * metrics[score.name],
        keep_checkpoints_without_metrics=False,
    )
    scored = [] if cfg.evaluation.data is None else [best]
    every = ocp.training.save_decision_policies.FixedIntervalPolicy(cfg.checkpoint_every)
    folder = absolute(cfg.output / CHECKPOINTS)
    if is_first():
        _set_aside_unreadable(folder)
        if not in_bucket(folder):
            folder.mkdir(parents=True, exist_ok=True)
    wait_for_all("checkpoints have metadata")
    with without_wildcards(folder) as place, ThreadPoolExecutor(1) as hashing:
        checkpoints = Checkpoints(
            folder,
            ocp.training.Checkpointer(
                place,
                save_decision_policy=every,
                preservation_policy=kept.AnyPreservationPolicy([latest, *scored]),
                cleanup_tmp_directories=True,
            ),
            score,
            hashing,
        )
        try:
            yield checkpoints
            checkpoints.wait()
            with _told(folder):
                checkpoints.orbax.close()
        except BaseException:
            with suppress(Exception):  # the first error says more
                checkpoints.orbax.close()
            for unfinished in folder.glob("*.orbax-checkpoint-tmp"):
                remove_folder(unfinished)  # on a full disk, it would keep it full
            raise


def _set_aside(checkpoint: Path, name: str) -> None:
    target = checkpoint.parent.parent / f"{name}-{checkpoint.name}"
    remove_folder(target)
    checkpoint.rename(target)


def _set_aside_unreadable(folder: Path) -> None:
    """Move away checkpoints with damaged metadata: Orbax opens none if it cannot read them all."""
    for checkpoint in folder.glob("[0-9]*") if folder.is_dir() else ():
        try:
            with suppress(OSError):  # out of reach is no damage: who restores it says so
                verify_checksums(checkpoint, only=[_METADATA])
        except DamagedFileError as error:
            _logger.warning("checkpoint of step %s is damaged (%s)", checkpoint.name, error)
            _set_aside(checkpoint, "damaged")


@contextmanager
def _told(folder: Path) -> Iterator[None]:
    """Say in one line what Orbax and TensorStore say in many: OSError, if a file is at fault."""
    try:
        yield
    except Exception as error:
        number = full_disk(error)
        if number is None and not isinstance(error, OSError):
            raise
        found = " ".join(str(error).split()) or type(error).__name__
        reason = found[:300] if number is None else os.strerror(number)
        raise OSError(
            f"{folder}: cannot write a checkpoint: {reason}; those before it are whole: mend that, "
            "then --resume"
        ) from error
