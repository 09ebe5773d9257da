"""What a run needs before its first step: data, model, optimizer and the compiled step."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from e5v_jax.checkpoints.converted import ConvertedFolder
from e5v_jax.checkpoints.loading import load_model
from e5v_jax.checkpoints.tokenizer import load_tokenizer
from e5v_jax.data.pairs import TrainingPairs
from e5v_jax.families.base import Processor
from e5v_jax.nn.layers import Build, Precision
from e5v_jax.runtime import Runtime
from e5v_jax.sharding import make_mesh
from e5v_jax.train.config import TrainConfig
from e5v_jax.train.feed import Feed, HostBatch, open_feed, place
from e5v_jax.train.optimizer import init_optimizer, make_optimizer
from e5v_jax.train.step import Metrics, TrainStep, make_train_step, split_trainable


@dataclass
class Training:
    """A model in training. A step replaces ``trainable`` and ``opt_state``."""

    processor: Processor
    runtime: Runtime
    feed: Feed
    graphdef: nnx.GraphDef[Any]
    frozen: nnx.State
    trainable: nnx.State
    opt_state: optax.OptState
    step_fn: TrainStep

    def step(self, batch: HostBatch, key: jax.Array) -> Metrics:
        """One optimizer step; ``key`` is for dropout."""
        self.trainable, self.opt_state, metrics = self.step_fn(
            self.trainable, self.opt_state, self.frozen, place(batch.arrays, self.runtime.mesh), key
        )
        return metrics


def set_up(cfg: TrainConfig, base: ConvertedFolder, triplets: TrainingPairs) -> Training:
    """Tokenise ``triplets``, load ``base`` onto the mesh, and make the step.

    Raises:
        ValueError: one line naming file, row and column, or the field of ``cfg``.
    """
    if cfg.quantize is not None and cfg.lora is None:
        raise ValueError("quantize: a quantised base is frozen, so it needs lora to train anything")
    if (cfg.model / "adapter").is_dir():
        raise ValueError(
            f"{cfg.model}/adapter: training would begin without this adapter; "
            "convert the model again with --adapter and --merge"
        )
    runtime = Runtime.on(make_mesh(cfg.mesh.data, cfg.mesh.fsdp, cfg.mesh.tensor))
    processor = base.family.processor(base.config, load_tokenizer(cfg.model), cfg.data.template)
    feed = open_feed(cfg, triplets, processor, runtime)

    # without images the vision tower is neither read nor placed; trained weights are fp32
    dtype = jnp.dtype(cfg.dtype)
    model = load_model(
        base,
        Build(
            Precision(dtype if cfg.lora else jnp.float32, compute=dtype, quantization=cfg.quantize),
            runtime,
            cfg.lora,
        ),
        load_vision=feed.has_images,
        seed=cfg.seed,
    )
    graphdef, trainable, frozen = split_trainable(model, lora=cfg.lora is not None)
    optimizer = make_optimizer(cfg.optimizer, feed.total_steps)
    opt_state = init_optimizer(optimizer, trainable, runtime.mesh)
    step_fn = make_train_step(
        graphdef,
        optimizer,
        columns=feed.columns,
        loss=cfg.loss,
        chunk_size=cfg.chunk_size,
        remat=cfg.remat,
        dropout=cfg.lora is not None and cfg.lora.dropout > 0,
        state=(trainable, opt_state),
    )
    return Training(processor, runtime, feed, graphdef, frozen, trainable, opt_state, step_fn)
