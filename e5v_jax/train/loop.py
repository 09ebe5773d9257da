"""A training run from top to bottom."""

import jax
import numpy as np
from flax import nnx
from orbax.checkpoint import v1 as ocp

from e5v_jax.checkpoints.converted import ConvertedFolder
from e5v_jax.data.pairs import TrainingPairs
from e5v_jax.distributed import initialize, is_first, wait_for_all
from e5v_jax.encode.encoder import Encoder
from e5v_jax.storage import remove_folder
from e5v_jax.train.checkpoint import load_best, open_checkpointer, restore, save
from e5v_jax.train.config import TrainConfig, check_counts
from e5v_jax.train.export import export_adapter, export_model
from e5v_jax.train.feed import HostBatch, load_data
from e5v_jax.train.identity import check_run_folder, check_same_run, run_info, write_run_info
from e5v_jax.train.metrics import Meter, MetricsLog
from e5v_jax.train.preemption import preemption
from e5v_jax.train.setup import Training, set_up
from e5v_jax.train.step import Metrics
from e5v_jax.train.validation import Validation


def train(cfg: TrainConfig) -> None:
    """Train as ``cfg`` says; everything goes to ``cfg.output``.

    A run that cannot begin leaves nothing behind. SIGTERM saves and returns.

    Raises:
        FileExistsError: ``cfg.output`` exists and ``cfg.resume`` is off.
        FileNotFoundError, ValueError: one line naming the file, row, key or field; the loss or the
            gradient is not finite.
    """
    check_counts(cfg)
    initialize(distributed=cfg.distributed)
    check_run_folder(cfg)
    base = ConvertedFolder(cfg.model)
    triplets = load_data(cfg.data)
    info = run_info(cfg, base.info.content_hash, triplets.fingerprint)
    check_same_run(cfg.output, info, allowed=cfg.allow_change)
    training = set_up(cfg, base, triplets)
    validation = None
    if cfg.evaluation.data is not None:
        encoder = Encoder(training.graphdef, training.processor, training.runtime)
        validation = Validation(cfg.evaluation.data, encoder, stride=cfg.evaluation.stride)

    wait_for_all("ready")  # nobody creates the run folder while another still checks for it
    write_run_info(cfg.output, info)
    with open_checkpointer(cfg) as checkpointer:
        if not _take_steps(cfg, training, triplets, validation, checkpointer):
            return
        if validation:
            best = load_best(checkpointer, training.trainable, training.runtime.mesh)
            if best is not None:
                step, score, training.trainable = best
                if is_first():
                    print(f"best checkpoint: step {step}, STS-B dev {score:.2f}")
    if cfg.lora is not None:
        result = cfg.output / "adapter"
        export_adapter(result, cfg.lora, training.trainable, base)
    else:
        result = cfg.output / "model"
        export_model(result, training.trainable, base)
    if is_first():
        print(f"{result}: written")


def _take_steps(
    cfg: TrainConfig,
    training: Training,
    triplets: TrainingPairs,
    validation: Validation | None,
    checkpointer: ocp.training.Checkpointer,
) -> bool:
    """From the newest checkpoint to the last step; False when preempted before it."""
    feed = training.feed
    start = 0
    accumulate_steps = cfg.optimizer.accumulate_steps
    restored = restore(
        checkpointer,
        training.trainable,
        training.opt_state,
        training.runtime.mesh,
        accumulate_steps=accumulate_steps,
    )
    if restored is not None:
        start, training.trainable, training.opt_state, position = restored
        feed.batches.set_state(position)
    if is_first() and start < feed.total_steps:
        remove_folder(cfg.output / "adapter")  # of an earlier, shorter end
    if is_first():
        trained, kept = _size(training.trainable), _size(training.frozen)
        print(
            f"{len(triplets)} rows, {feed.total_steps} steps of {cfg.batch_size}, padded "
            f"lengths {feed.lengths}, {trained / 1e6:.2f} M trainable of "
            f"{(trained + kept) / 1e6:.1f} M parameters, from step {start}"
        )
    dropout_key = jax.random.key(cfg.seed)
    log = MetricsLog(cfg.output, start, feed.total_steps, wandb_project=cfg.wandb_project)
    with log, preemption() as noted:
        meter = Meter(start)
        for step in range(start + 1, feed.total_steps + 1):
            batch = next(feed.batches)
            metrics = training.step(batch, jax.random.fold_in(dropout_key, step))
            _check_finite(step, metrics, batch, triplets, checkpointer)
            speed = meter.add(step, cfg.batch_size, batch.tokens)
            log.show(step, float(metrics.loss), speed)
            if step % cfg.log_every == 0 or step in (start + 1, feed.total_steps):
                values = {name: float(value) for name, value in metrics._asdict().items()}
                log.write(step, values, speed)
                meter = Meter(step)
            preempted = noted(step)
            last = step == feed.total_steps
            score = None
            saved = last or step % cfg.checkpoint_every == 0
            if validation and saved and not preempted:
                score = validation.score(training.trainable, training.frozen)
                log.write_score(step, score)
                meter = Meter(step)  # time spent here is not the step's
            if saved or preempted:
                log.upload()
            save(
                checkpointer,
                step,
                training.trainable,
                training.opt_state,
                feed.batches.get_state(),
                accumulate_steps=accumulate_steps,
                last=last or preempted,
                score=score,
            )
            if preempted and not last:
                checkpointer.wait()
                if is_first():
                    print(f"preempted at step {step}; continue with --resume", flush=True)
                return False
    return True


def _check_finite(
    step: int,
    metrics: Metrics,
    batch: HostBatch,
    triplets: TrainingPairs,
    checkpointer: ocp.training.Checkpointer,
) -> None:
    """Stop before anything of a step that went wrong is saved."""
    loss, grad_norm = float(metrics.loss), float(metrics.grad_norm)
    if np.isfinite([loss, grad_norm]).all():
        return
    checkpointer.wait()
    remedy = "start again with a lower learning rate"
    if checkpointer.latest is not None:
        remedy = (
            f"--resume from step {checkpointer.latest.step}, the last good checkpoint, with a "
            "lower learning rate (--allow-change optimizer.learning_rate)"
        )
    ids = ", ".join(triplets.row_ids[row] for row in batch.rows)
    found = f"step {step}: the loss is {loss}, the gradient norm {grad_norm}"
    raise ValueError(f"{found}: {remedy}; its rows: {ids}")


def _size(state: nnx.State) -> int:
    return sum(int(x.size) for x in jax.tree.leaves(state))
