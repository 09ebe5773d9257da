"""A training run from top to bottom."""

import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from e5v_jax.converted import ConvertedFolder
from e5v_jax.data.pairs import Triplets, load_tfds, load_triplets
from e5v_jax.data.pipeline import make_batches
from e5v_jax.embedder import load_tokenizer
from e5v_jax.loading import load_model
from e5v_jax.model.layers import Precision
from e5v_jax.prompts import detect_template
from e5v_jax.sharding import batch_sharding, make_mesh
from e5v_jax.train.batches import group_lengths, make_pair_batch, tokenize_pairs
from e5v_jax.train.checkpoint import (
    check_run_folder,
    check_same_run,
    open_checkpointer,
    restore,
    run_info,
    save,
    write_run_info,
)
from e5v_jax.train.config import DataConfig, TrainConfig
from e5v_jax.train.export import export_adapter, export_model
from e5v_jax.train.metrics import MetricsLog
from e5v_jax.train.step import (
    PairBatch,
    init_optimizer,
    make_optimizer,
    make_train_step,
    split_trainable,
)


class HostBatch(NamedTuple):
    """One step's data on the host."""

    rows: np.ndarray  # int64 [B], row numbers in the training data
    arrays: PairBatch  # NumPy
    tokens: int  # real tokens, padding not counted


def load_data(cfg: DataConfig) -> Triplets:
    """The training pairs that ``cfg`` names.

    Raises:
        ValueError: no source, or two.
    """
    if bool(cfg.path) == (cfg.tfds is not None):
        raise ValueError("data: give either --data.path or --data.tfds")
    if cfg.tfds is not None:
        return load_tfds(cfg.tfds, data_dir=cfg.tfds_dir)
    return load_triplets(cfg.path)


def place(batch: PairBatch, mesh: Mesh) -> PairBatch:
    """Host arrays onto the mesh: groups split along the batch, the order replicated."""
    return PairBatch(
        groups=jax.device_put(batch.groups, batch_sharding(mesh)),
        order=jax.device_put(batch.order, NamedSharding(mesh, PartitionSpec())),
    )


def train(cfg: TrainConfig) -> None:
    """Train as ``cfg`` says; everything goes to ``cfg.output``.

    A run that cannot begin leaves nothing behind.

    Raises:
        FileExistsError: ``cfg.output`` exists and ``cfg.resume`` is off.
        FileNotFoundError, ValueError: one line naming the file, row, key or field; the loss or the
            gradient is not finite.
    """
    check_run_folder(cfg)

    # data: every sentence tokenised once, batches in an order fixed by the seed
    base = ConvertedFolder(cfg.model)
    if (cfg.model / "adapter").is_dir():
        raise ValueError(
            f"{cfg.model}/adapter: training would begin without this adapter; "
            "convert the model again with --adapter and --merge"
        )
    triplets = load_data(cfg.data)
    info = run_info(cfg, base.info.content_hash, triplets.fingerprint)
    check_same_run(cfg.output, info)
    tokenizer = load_tokenizer(cfg.model)
    template = detect_template(tokenizer, base.config.text.model_type, override=cfg.data.template)
    tokens = tokenize_pairs(triplets, tokenizer, cfg.data, template)
    mesh = make_mesh(cfg.mesh.data, cfg.mesh.fsdp, cfg.mesh.tensor)
    multiple = mesh.shape["data"] * mesh.shape["fsdp"]

    def index_batches() -> list[np.ndarray]:
        return list(
            make_batches(
                triplets, batch_size=cfg.batch_size, seed=cfg.seed, num_epochs=cfg.num_epochs
            )
        )

    order = index_batches()
    total_steps = len(order) if cfg.max_steps is None else min(cfg.max_steps, len(order))
    lengths = group_lengths(
        tokens.lengths, order[:total_steps], groups=cfg.data.length_groups, multiple=multiple
    )

    def host_batch(rows: np.ndarray) -> HostBatch:
        arrays = make_pair_batch(tokens, rows, lengths=lengths, pad_id=0, multiple=multiple)
        return HostBatch(rows, arrays, int(tokens.lengths[:, rows].sum()))

    batches = make_batches(
        triplets,
        batch_size=cfg.batch_size,
        seed=cfg.seed,
        num_epochs=cfg.num_epochs,
        transform=host_batch,
    )

    # model: the vision tower is neither read nor placed; trained weights are fp32
    dtype = jnp.dtype(cfg.dtype)
    model = load_model(
        base,
        precision=Precision(param=dtype if cfg.lora else jnp.float32, compute=dtype),
        mesh=mesh,
        lora=cfg.lora,
        load_vision=False,
        seed=cfg.seed,
    )
    graphdef, trainable, frozen = split_trainable(model, lora=cfg.lora is not None)
    del model
    optimizer = make_optimizer(cfg.optimizer, total_steps)
    opt_state = init_optimizer(optimizer, trainable, mesh)
    step_fn = make_train_step(
        graphdef,
        optimizer,
        columns=tokens.columns,
        temperature=cfg.temperature,
        remat=cfg.remat,
        dropout=cfg.lora is not None and cfg.lora.dropout > 0,
    )

    write_run_info(cfg.output, info)
    with open_checkpointer(cfg) as checkpointer:
        start = 0
        restored = restore(checkpointer, trainable, opt_state, mesh)
        if restored is not None:
            start, trainable, opt_state, position = restored
            batches.set_state(position)
        print(
            f"{len(triplets)} rows, {total_steps} steps of {cfg.batch_size}, padded lengths "
            f"{lengths}, {_size(trainable) / 1e6:.2f} M trainable of "
            f"{(_size(trainable) + _size(frozen)) / 1e6:.1f} M parameters, from step {start}"
        )
        with MetricsLog(cfg.output, start_step=start, total_steps=total_steps) as log:
            dropout_key = jax.random.key(cfg.seed)
            since, done, seen_tokens = time.perf_counter(), start, 0
            for step in range(start + 1, total_steps + 1):
                batch = next(batches)
                trainable, opt_state, metrics = step_fn(
                    trainable,
                    opt_state,
                    frozen,
                    place(batch.arrays, mesh),
                    jax.random.fold_in(dropout_key, step),
                )
                seen_tokens += batch.tokens
                loss, grad_norm = float(metrics.loss), float(metrics.grad_norm)
                if not np.isfinite([loss, grad_norm]).all():  # before anything of it is saved
                    ids = ", ".join(triplets.row_ids[row] for row in batch.rows[:3])
                    saved = checkpointer.latest
                    raise ValueError(
                        f"step {step}: the loss is {loss}, the gradient norm {grad_norm}; rows "
                        f"{ids}, ...: lower the learning rate, then "
                        + (f"--resume from step {saved.step}" if saved else "start again")
                    )
                elapsed = time.perf_counter() - since
                rate = (step - done) * cfg.batch_size / elapsed
                log.show(step, loss, rate, seen_tokens / elapsed)
                if step % cfg.log_every == 0 or step in (start + 1, total_steps):
                    log.write(
                        step,
                        {
                            "loss": loss,
                            "accuracy": float(metrics.accuracy),
                            "grad_norm": grad_norm,
                            "triplets_per_s": rate,
                            "tokens_per_s": seen_tokens / elapsed,
                            "seconds_per_step": elapsed / (step - done),
                        },
                    )
                    since, done, seen_tokens = time.perf_counter(), step, 0
                save(
                    checkpointer,
                    step,
                    trainable,
                    opt_state,
                    batches.get_state(),
                    last=step == total_steps,
                )

    if cfg.lora is not None:
        result = cfg.output / "adapter"
        export_adapter(result, cfg.lora, trainable, base)
    else:
        result = cfg.output / "model"
        export_model(result, trainable, base)
    print(f"{result}: written")


def _size(state: nnx.State) -> int:
    return sum(int(x.size) for x in jax.tree.leaves(state))
