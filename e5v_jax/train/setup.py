"""What a run needs before its first step: data, model, optimizer and the compiled step."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from e5v_jax.checkpoints.converted import ConvertedFolder
from e5v_jax.checkpoints.loading import load_model
from e5v_jax.checkpoints.tokenizer import load_tokenizer
from e5v_jax.data.pairs import TrainingPairs
from e5v_jax.families.base import Model, Processor, Together
from e5v_jax.nn.layers import Build, Precision
from e5v_jax.presets import find_preset
from e5v_jax.runtime import Runtime
from e5v_jax.sharding import make_mesh
from e5v_jax.train.config import OptimizerConfig, RunConfig, TrainConfig
from e5v_jax.train.feed import Feed, HostBatch, open_feed, place
from e5v_jax.train.optimizer import init_optimizer, make_optimizer
from e5v_jax.train.step import (
    Loss,
    Metrics,
    TrainStep,
    make_train_step,
    pair_loss,
    split_trainable,
)


@dataclass
class StepParts:
    """A step and what it works on: arrays, or the ``jax.ShapeDtypeStruct`` of each."""

    graphdef: nnx.GraphDef[Any]
    frozen: nnx.State
    trainable: nnx.State
    opt_state: optax.OptState
    step_fn: TrainStep


@dataclass
class Training(StepParts):
    """A model in training. A step replaces ``trainable`` and ``opt_state``."""

    processor: Processor
    runtime: Runtime
    feed: Feed
    place: Callable[[Any, Mesh], Any]  # a batch's arrays onto the mesh

    def step(self, batch: HostBatch, key: jax.Array) -> Metrics:
        """One optimizer step; ``key`` is for dropout."""
        self.trainable, self.opt_state, metrics = self.step_fn(
            self.trainable,
            self.opt_state,
            self.frozen,
            self.place(batch.arrays, self.runtime.mesh),
            key,
        )
        return metrics


def train_build(cfg: RunConfig, runtime: Runtime) -> Build:
    """Build so that trained weights are fp32. Raises ValueError: a quantised base without LoRA."""
    if cfg.quantize is not None and cfg.lora is None:
        raise ValueError("quantize: a quantised base is frozen, so it needs lora to train anything")
    dtype = jnp.dtype(cfg.dtype)
    precision = Precision(dtype if cfg.lora else jnp.float32, dtype, cfg.quantize)
    return Build(precision, runtime, cfg.lora)


def make_parts(
    cfg: RunConfig,
    model: Model,
    loss_of: Loss,
    make: Callable[[OptimizerConfig, int], optax.GradientTransformation] = make_optimizer,
    *,
    total_steps: int,
    wanted: Any = None,
) -> StepParts:
    """The optimizer that ``make`` makes and the jitted step of a model, loaded or abstract.

    The schedule ends at ``total_steps``; ``wanted`` is as in :func:`split_trainable`.
    """
    has_lora = cfg.lora is not None
    graphdef, trainable, frozen = split_trainable(model, lora=has_lora, wanted=wanted)
    optimizer = make(cfg.optimizer, total_steps)
    opt_state = init_optimizer(optimizer, trainable, model.runtime.mesh)
    step_fn = make_train_step(
        graphdef,
        optimizer,
        loss_of,
        dropout=cfg.lora is not None and cfg.lora.dropout > 0,
        state=(trainable, opt_state),
    )
    return StepParts(graphdef, frozen, trainable, opt_state, step_fn)


def make_step(
    cfg: TrainConfig,
    model: Model,
    *,
    columns: int,
    total_steps: int,
    together: Together | None = None,
) -> StepParts:
    """The step on pairs of a model, loaded or abstract (checkpoints/loading.py).

    ``columns`` is 3 for triplets, 2 for pairs; the schedule ends at ``total_steps``; ``together``
    is how texts share rows.
    """
    loss_of = partial(
        pair_loss,
        columns=columns,
        loss=cfg.loss,
        chunk_size=cfg.chunk_size,
        remat=cfg.remat,
        together=together,
    )
    return make_parts(cfg, model, loss_of, total_steps=total_steps)


def open_base(cfg: RunConfig, base: ConvertedFolder) -> Processor:
    """Check that ``base`` is what training begins with; make its processor.

    Raises ValueError: it has an adapter; a preset or template that it has not.
    """
    if (cfg.model / "adapter").is_dir():
        raise ValueError(
            f"{cfg.model}/adapter: training would begin without this adapter; "
            "convert the model again with --adapter and --merge"
        )
    preset = find_preset(cfg.data.preset, *base.known_as, str(cfg.model))
    preset = preset.with_pixels(cfg.data.min_pixels, cfg.data.max_pixels)
    processor: Processor = base.family.processor(
        base.config, load_tokenizer(cfg.model), cfg.data.template, preset
    )
    return processor


def set_up(cfg: TrainConfig, base: ConvertedFolder, triplets: TrainingPairs) -> Training:
    """Tokenise ``triplets``, load ``base`` onto the mesh, and make the step.

    Raises ValueError: one line naming file, row and column, or the field of ``cfg``.
    """
    runtime = Runtime.on(make_mesh(cfg.mesh.data, cfg.mesh.fsdp, cfg.mesh.tensor))
    build = train_build(cfg, runtime)
    processor = open_base(cfg, base)
    feed = open_feed(cfg, triplets, processor, runtime)
    vision = feed.has_images  # for texts, the tower is neither read nor placed
    model = load_model(base, build, load_vision=vision, seed=cfg.seed)
    parts = make_step(
        cfg, model, columns=feed.columns, total_steps=feed.total_steps, together=feed.together
    )
    return Training(**vars(parts), processor=processor, runtime=runtime, feed=feed, place=place)
