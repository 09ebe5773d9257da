"""A training run from top to bottom."""

from collections.abc import Callable
from functools import partial
from math import isfinite

import jax
import optax

from e5v_jax.atomic import naming
from e5v_jax.checkpoints.converted import ConvertedFolder
from e5v_jax.distributed import initialize, is_first, wait_for_all
from e5v_jax.lock import Lock, hold_in_first
from e5v_jax.storage import remove_folder
from e5v_jax.train.checkpoint import Checkpoints, open_checkpoints
from e5v_jax.train.config import RunConfig, TrainConfig, check_sizes, check_values
from e5v_jax.train.identity import (
    check_run_folder,
    check_same_run,
    run_info,
    tell_lost_checkpoints,
    write_run_info,
)
from e5v_jax.train.metrics import MetricsLog
from e5v_jax.train.pairs import TASK
from e5v_jax.train.preemption import preemption
from e5v_jax.train.restore import restore
from e5v_jax.train.setup import Training
from e5v_jax.train.task import Rows, Task, Validation


def train(cfg: TrainConfig) -> None:
    """Train as ``cfg`` says; raises as :func:`run`."""
    run(cfg, TASK)


def run(cfg: RunConfig, task: Task) -> None:
    """Train as ``cfg`` says; everything goes to ``cfg.output``.

    A run that cannot begin leaves nothing behind. SIGTERM saves and returns.

    Raises FileExistsError: ``cfg.output`` exists, ``cfg.resume`` is off; FileNotFoundError,
    ValueError: one line naming the file, row, key or field; a loss or gradient is not finite;
    OSError: another program works on ``cfg.output``, or the disk is full.
    """
    check_values(cfg)
    initialize(distributed=cfg.distributed)
    check_run_folder(cfg)
    with hold_in_first(cfg.output) as lock, naming(cfg.output):
        check_run_folder(cfg)  # another may have begun or ended it meanwhile
        _run(cfg, task, lock)


def _run(cfg: RunConfig, task: Task, lock: Lock | None) -> None:
    base = ConvertedFolder(cfg.model, verify=cfg.verify)
    check_sizes(cfg, base.config.text.hidden_size)
    data = task.load_data(cfg)
    info = run_info(cfg, base.info.content_hash, data.fingerprint)
    check_same_run(cfg.output, info, allowed=cfg.allow_change, config_type=type(cfg))
    training = task.set_up(cfg, base, data)
    validation = task.make_validation(cfg, training)

    wait_for_all("ready")  # nobody creates the run folder while another still checks for it
    write_run_info(cfg.output, info)
    with open_checkpoints(cfg, task.score) as checkpoints:
        log = partial(MetricsLog, cfg.output, unit=task.unit, wandb_project=cfg.wandb_project)
        if not _take_steps(cfg, training, data, validation, checkpoints, log, lock):
            return
        if validation and (best := checkpoints.load_best(training.trainable)):
            step, score, training.trainable = best
            if is_first():
                print(f"best checkpoint: step {step}, {task.score.label} {score:.2f}")
    task.export(cfg, training.trainable, base)


def _take_steps(
    cfg: RunConfig,
    training: Training,
    data: Rows,
    validation: Validation | None,
    checkpoints: Checkpoints,
    open_log: Callable[[int, int], MetricsLog],
    lock: Lock | None,
) -> bool:
    """Go from the newest checkpoint to the last step; False when preempted before it."""
    feed, start = training.feed, 0
    every = cfg.optimizer.accumulate_steps
    fresh = training.trainable, training.opt_state, training.runtime.mesh
    restored = restore(checkpoints, *fresh, accumulate_steps=every)
    if restored is None:
        tell_lost_checkpoints(cfg.output)
    else:
        start, training.trainable, training.opt_state, position = restored
        feed.batches.set_state(position)
    if is_first():
        if start < feed.total_steps:
            for end in ("adapter", "model"):  # of an earlier, shorter run
                remove_folder(cfg.output / end)
        trained, kept = map(optax.tree.size, (training.trainable, training.frozen))
        print(
            f"{len(data)} rows, {feed.total_steps} steps of {cfg.batch_size}, padded "
            f"lengths {feed.lengths}, {trained / 1e6:.2f} M trainable of "
            f"{(trained + kept) / 1e6:.1f} M parameters, from step {start}"
        )
    dropout_key = jax.random.key(cfg.seed)
    with open_log(start, feed.total_steps) as log, preemption() as noted:
        for step in range(start + 1, feed.total_steps + 1):
            batch = next(feed.batches)
            metrics = training.step(batch, jax.random.fold_in(dropout_key, step))
            finite = bool(metrics.finite)
            values = {name: float(x) for name, x in metrics._asdict().items() if name != "finite"}
            loss, norm = values["loss"], values["grad_norm"]
            known = isfinite(loss) and isfinite(norm)
            if not known or not finite:  # nothing of this step is saved
                rows = ", ".join(data.row_ids[row] for row in batch.rows)
                found = f"step {step}: the loss is {loss}, the gradient norm {norm}"
                found += "" if finite else ", and parameters after it are not finite"
                if not known:
                    _move_away(checkpoints, step - 1)
                raise ValueError(f"{found}: {_remedy(checkpoints)}; its rows: {rows}")
            last = step == feed.total_steps
            due = step % cfg.log_every == 0 or last or step == start + 1
            log.add(step, values, rows=cfg.batch_size, tokens=batch.tokens, due=due)
            preempted = noted(step)
            score = None
            saved = last or step % cfg.checkpoint_every == 0
            if validation and saved and not preempted:
                scores = validation.score(training.trainable, training.frozen)
                score = scores[checkpoints.score.name]
                log.add_scores(step, scores)
            if saved or preempted:
                log.upload()
            if lock is not None:
                lock.check()
            state = step, training.trainable, training.opt_state, feed.batches.get_state()
            last_save = last or preempted
            checkpoints.save(*state, accumulate_steps=every, last=last_save, score=score)
            if preempted and not last:
                checkpoints.wait()
                if is_first():
                    print(f"preempted at step {step}; continue with --resume", flush=True)
                return False
    return True


def _move_away(checkpoints: Checkpoints, step: int) -> None:
    """Move away the checkpoint of ``step`` if there is one, as the step after it is not finite.

    That one's loss and gradient are those of its parameters, so that a resumed run would come to
    the same, whatever its learning rate.
    """
    checkpoints.wait()
    if step in checkpoints.steps:
        checkpoints.set_aside([step], "not-finite")


def _remedy(checkpoints: Checkpoints) -> str:
    """Tell what to do about a step that is not finite, once all checkpoints are written."""
    checkpoints.wait()
    if not checkpoints.steps:
        return "start again with a lower learning rate"
    return (
        f"--resume from step {checkpoints.steps[-1]}, the last good checkpoint, with a "
        "lower learning rate (--allow-change optimizer.learning_rate)"
    )
