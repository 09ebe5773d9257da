"""The real programs of a run with shapes in place of arrays: no weights, no accelerator."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from e5v_jax.align.config import AlignConfig
from e5v_jax.align.loss import CaptionBatch
from e5v_jax.align.task import align_build, masters
from e5v_jax.align.task import make_step as make_align_step
from e5v_jax.checkpoints.loading import abstract_model
from e5v_jax.encode.encoder import make_encode_step
from e5v_jax.families.base import BatchShape, Family, Model, ModelConfig, Together
from e5v_jax.nn.decoder import Packing
from e5v_jax.nn.layers import Build, Precision
from e5v_jax.nn.parameters import ParameterTable
from e5v_jax.runtime import Runtime
from e5v_jax.sharding import batch_sharding
from e5v_jax.train.config import TrainConfig
from e5v_jax.train.feed import group_multiple
from e5v_jax.train.setup import make_step, train_build
from e5v_jax.train.step import PairBatch

COLUMNS = 3  # triplets
BEGINNING = 5  # tokens before the sentence in Llama-3's prompts; in chatml's there are 3
TOTAL_STEPS = 718  # of the paper's run; only the schedule's constants depend on it


@dataclass(frozen=True)
class Target:
    """A model, and where it is to run."""

    family: Family
    config: ModelConfig
    runtime: Runtime

    @property
    def table(self) -> ParameterTable:
        """Its parameters."""
        return self.family.parameters(self.config)

    def model(self, build: Build, *, load_vision: bool, masters: tuple[str, ...] = ()) -> Model:
        """The module with shapes in place of arrays; ``masters`` are as in `abstract_model`."""
        return abstract_model(
            self.family, self.config, build, load_vision=load_vision, masters=masters
        )

    def batch(self, shape: BatchShape) -> Any:
        """The shapes of a batch, split over the mesh."""
        shapes = jax.eval_shape(partial(self.family.example_batch, self.config, shape))
        return _place(shapes, batch_sharding(self.runtime.mesh))


@dataclass(frozen=True)
class Program:
    """A jitted function, the shapes of its arguments, and which of them are what."""

    function: Any  # a jitted function; jax has no public type for one
    args: tuple[Any, ...]
    frozen: Any  # pytrees of ShapeDtypeStruct, parts of args
    trainable: Any = ()
    optimizer: Any = ()

    def trace(self) -> Any:
        """The function traced for the devices in its arguments' shardings."""
        return self.function.trace(*self.args)


def per_device_bytes(tree: Any) -> int:
    """Bytes that the arrays of ``tree`` take on one device; uint4 counts half a byte."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        bits = 4 if leaf.dtype in (jnp.uint4, jnp.int4) else 8 * leaf.dtype.itemsize
        total += (math.prod(leaf.sharding.shard_shape(leaf.shape)) * bits + 7) // 8
    return total


def _place(tree: Any, sharding: NamedSharding) -> Any:
    """Shapes with that sharding."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def assumed_rows(cfg: TrainConfig) -> Together | None:
    """How texts share rows, if they do, with the beginning of Llama-3's prompts."""
    return Together(cfg.texts_per_row, BEGINNING) if cfg.texts_per_row > 1 else None


def train_program(cfg: TrainConfig, target: Target, sequence_lengths: tuple[int, ...]) -> Program:
    """The step of a training run on triplets of texts, as train/setup.py makes it.

    ``sequence_lengths`` are the padded lengths of the groups that the batch is split into.
    Raises ValueError: an axis, the batch or the chunks do not divide over the mesh.
    """
    inputs, groups = COLUMNS * cfg.batch_size, len(sequence_lengths)
    multiple = group_multiple(cfg, target.runtime, texts_per_row=cfg.texts_per_row)
    if inputs % (multiple * groups):
        raise ValueError(
            f"{inputs} sentences a step cannot be split into {groups} groups of parts of "
            f"{multiple} (the devices that share a batch, or chunk_size): take one that divides "
            f"{inputs // groups}"
        )
    model = target.model(train_build(cfg, target.runtime), load_vision=False)
    parts = make_step(
        cfg, model, columns=COLUMNS, total_steps=TOTAL_STEPS, together=assumed_rows(cfg)
    )
    whole = NamedSharding(target.runtime.mesh, PartitionSpec())
    numbers = jax.ShapeDtypeStruct((inputs,), jnp.int32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    order, text_ids, key = _place((numbers, numbers, key), whole)
    batches = tuple(target.batch(BatchShape(inputs // groups, n)) for n in sequence_lengths)
    return Program(
        parts.step_fn,
        (parts.trainable, parts.opt_state, parts.frozen, PairBatch(batches, order, text_ids), key),
        parts.frozen,
        parts.trainable,
        parts.opt_state,
    )


def align_program(cfg: AlignConfig, target: Target, shape: BatchShape, labels: int) -> Program:
    """The step of an alignment as align/task.py makes it, on one image in each row of ``shape``.

    ``labels`` is the number of tokens that are predicted in a row. Raises ValueError: an axis, the
    batch or the chunks do not divide over the mesh.
    """
    multiple = group_multiple(cfg, target.runtime)
    if shape.rows % multiple:
        raise ValueError(f"batch_size: {shape.rows} images are no multiple of {multiple}")
    build, fp32 = align_build(cfg, target.runtime), masters(cfg, target.family)
    model = target.model(build, load_vision=True, masters=fp32)
    parts = make_align_step(cfg, model, target.family, total_steps=TOTAL_STEPS)
    inputs = target.batch(shape)
    split = batch_sharding(target.runtime.mesh)
    if cfg.data.features is not None:  # what the tower makes of the tiles, in place of them
        graphdef, state = nnx.split(model)

        def tower(state: nnx.State, tiles: Any) -> Any:
            module: Any = nnx.merge(graphdef, state)
            return module.tile_features(tiles)

        features = jax.eval_shape(tower, state, inputs.tiles)
        inputs = inputs._replace(tiles=_place(features, split))

    def of(columns: int) -> Any:
        return jax.ShapeDtypeStruct((shape.rows, columns), jnp.int32, sharding=split)

    numbers, places = of(labels), of(shape.length)
    packing = Packing(places, places) if cfg.data.captions == "all" else None
    whole = NamedSharding(target.runtime.mesh, PartitionSpec())
    return Program(
        parts.step_fn,
        (
            parts.trainable,
            parts.opt_state,
            parts.frozen,
            CaptionBatch(inputs, numbers, numbers, packing),
            _place(jax.eval_shape(lambda: jax.random.key(0)), whole),
        ),
        parts.frozen,
        parts.trainable,
        parts.opt_state,
    )


def encode_program(target: Target, shape: BatchShape, precision: Precision) -> Program:
    """The model over one batch of texts or, with a shape key, images, as the encoder runs it."""
    build = Build(precision, target.runtime)
    graphdef, state = nnx.split(target.model(build, load_vision=shape.shape_key > 0))
    return Program(make_encode_step(graphdef, target.runtime), (state, target.batch(shape)), state)
