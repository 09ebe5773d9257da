"""A training run from top to bottom."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from orbax.checkpoint import v1 as ocp

from e5v_jax.converted import ConvertedFolder
from e5v_jax.embedder import load_tokenizer, with_image_token
from e5v_jax.loading import load_model
from e5v_jax.model.layers import Precision
from e5v_jax.prompts import detect_template
from e5v_jax.sharding import make_mesh
from e5v_jax.train.checkpoint import (
    check_run_folder,
    check_same_run,
    load_best,
    open_checkpointer,
    restore,
    run_info,
    save,
    write_run_info,
)
from e5v_jax.train.config import TrainConfig
from e5v_jax.train.distributed import initialize, is_first, wait_for_all
from e5v_jax.train.export import export_adapter, export_model
from e5v_jax.train.feed import load_data, open_feed, place
from e5v_jax.train.metrics import Meter, MetricsLog
from e5v_jax.train.optimizer import init_optimizer, make_optimizer
from e5v_jax.train.preemption import Preemption
from e5v_jax.train.step import make_train_step, split_trainable
from e5v_jax.train.validation import Validation


def train(cfg: TrainConfig) -> None:
    """Train as ``cfg`` says; everything goes to ``cfg.output``.

    A run that cannot begin leaves nothing behind. SIGTERM saves and returns.

    Raises:
        FileExistsError: ``cfg.output`` exists and ``cfg.resume`` is off.
        FileNotFoundError, ValueError: one line naming the file, row, key or field; the loss or the
            gradient is not finite.
    """
    initialize(distributed=cfg.distributed)
    check_run_folder(cfg)
    if cfg.quantize is not None and cfg.lora is None:
        raise ValueError("quantize: a quantised base is frozen, so it needs lora to train anything")

    # data: an order of batches fixed by the seed, the same whatever the number of processes
    base = ConvertedFolder(cfg.model)
    if (cfg.model / "adapter").is_dir():
        raise ValueError(
            f"{cfg.model}/adapter: training would begin without this adapter; "
            "convert the model again with --adapter and --merge"
        )
    triplets = load_data(cfg.data)
    info = run_info(cfg, base.info.content_hash, triplets.fingerprint)
    check_same_run(cfg.output, info, allowed=cfg.allow_change)
    tokenizer = load_tokenizer(cfg.model)
    template = detect_template(tokenizer, base.config.text.model_type, override=cfg.data.template)
    mesh = make_mesh(cfg.mesh.data, cfg.mesh.fsdp, cfg.mesh.tensor)
    model_config = with_image_token(base.config, tokenizer)
    feed = open_feed(cfg, triplets, tokenizer, template, model_config, mesh)

    # model: without images the vision tower is neither read nor placed; trained weights are fp32
    dtype = jnp.dtype(cfg.dtype)
    model = load_model(
        base,
        precision=Precision(
            param=dtype if cfg.lora else jnp.float32, compute=dtype, quantization=cfg.quantize
        ),
        mesh=mesh,
        lora=cfg.lora,
        load_vision=feed.has_images,
        seed=cfg.seed,
    )
    graphdef, trainable, frozen = split_trainable(model, lora=cfg.lora is not None)
    del model
    optimizer = make_optimizer(cfg.optimizer, feed.total_steps)
    opt_state = init_optimizer(optimizer, trainable, mesh)
    step_fn = make_train_step(
        graphdef,
        optimizer,
        columns=feed.columns,
        loss=cfg.loss,
        chunk_size=cfg.chunk_size,
        remat=cfg.remat,
        dropout=cfg.lora is not None and cfg.lora.dropout > 0,
        state=(trainable, opt_state),
        mesh=mesh,
    )
    validation = None
    if cfg.evaluation.data is not None:
        validation = Validation(
            cfg.evaluation.data,
            graphdef,
            tokenizer,
            template,
            mesh,
            stride=cfg.evaluation.stride,
        )

    wait_for_all("ready")  # nobody creates the run folder while another still checks for it
    write_run_info(cfg.output, info)
    with open_checkpointer(cfg) as checkpointer, Preemption() as preemption:
        start = 0
        restored = restore(checkpointer, trainable, opt_state, mesh)
        if restored is not None:
            start, trainable, opt_state, position = restored
            feed.batches.set_state(position)
        if is_first():
            print(
                f"{len(triplets)} rows, {feed.total_steps} steps of {cfg.batch_size}, padded "
                f"lengths {feed.lengths}, {_size(trainable) / 1e6:.2f} M trainable of "
                f"{(_size(trainable) + _size(frozen)) / 1e6:.1f} M parameters, from step {start}"
            )
        with MetricsLog(
            cfg.output, start, feed.total_steps, wandb_project=cfg.wandb_project
        ) as log:
            dropout_key = jax.random.key(cfg.seed)
            meter = Meter(start)
            for step in range(start + 1, feed.total_steps + 1):
                batch = next(feed.batches)
                trainable, opt_state, metrics = step_fn(
                    trainable,
                    opt_state,
                    frozen,
                    place(batch.arrays, mesh),
                    jax.random.fold_in(dropout_key, step),
                )
                loss, grad_norm = float(metrics.loss), float(metrics.grad_norm)
                if not np.isfinite([loss, grad_norm]).all():  # before anything of it is saved
                    ids = ", ".join(triplets.row_ids[row] for row in batch.rows)
                    found = f"step {step}: the loss is {loss}, the gradient norm {grad_norm}"
                    raise ValueError(f"{found}: {_remedy(checkpointer)}; its rows: {ids}")
                speed = meter.add(step, cfg.batch_size, batch.tokens)
                log.show(step, loss, speed)
                if step % cfg.log_every == 0 or step in (start + 1, feed.total_steps):
                    values = {
                        "loss": loss,
                        "accuracy": float(metrics.accuracy),
                        "grad_norm": grad_norm,
                    }
                    log.write(step, values, speed)
                    meter = Meter(step)
                preempted = preemption.noted(step)
                last = step == feed.total_steps
                score = None
                if validation and (last or step % cfg.checkpoint_every == 0) and not preempted:
                    score = validation.score(trainable, frozen)
                    log.write_score(step, score)
                    meter = Meter(step)  # time spent here is not the step's
                save(
                    checkpointer,
                    step,
                    trainable,
                    opt_state,
                    feed.batches.get_state(),
                    last=last or preempted,
                    score=score,
                )
                if preempted and not last:
                    checkpointer.wait()
                    if is_first():
                        print(f"preempted at step {step}; continue with --resume", flush=True)
                    return
            best = load_best(checkpointer, trainable, mesh) if validation else None

    if best is not None:
        best_step, score, trainable = best
        if is_first():
            print(f"best checkpoint: step {best_step}, STS-B dev {score:.2f}")
    if cfg.lora is not None:
        result = cfg.output / "adapter"
        export_adapter(result, cfg.lora, trainable, base)
    else:
        result = cfg.output / "model"
        export_model(result, trainable, base)
    if is_first():
        print(f"{result}: written")


def _remedy(checkpointer: ocp.training.Checkpointer) -> str:
    checkpointer.wait()
    if checkpointer.latest is None:
        return "start again with a lower learning rate"
    return (
        f"--resume from step {checkpointer.latest.step}, the last good checkpoint, with a lower "
        "learning rate (--allow-change optimizer.learning_rate)"
    )


def _size(state: nnx.State) -> int:
    return sum(int(x.size) for x in jax.tree.leaves(state))
