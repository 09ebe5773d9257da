"""The real programs of a run with shapes in place of arrays: no weights, no accelerator."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from e5v_jax.checkpoints.loading import abstract_model
from e5v_jax.encode.encoder import make_encode_step
from e5v_jax.families.base import BatchShape, Family, ModelConfig
from e5v_jax.nn.layers import Precision
from e5v_jax.nn.quantized import Quantization
from e5v_jax.runtime import Runtime
from e5v_jax.sharding import batch_sharding
from e5v_jax.train.config import TrainConfig
from e5v_jax.train.feed import group_multiple
from e5v_jax.train.setup import make_step, train_precision
from e5v_jax.train.step import PairBatch

COLUMNS = 3  # triplets
TOTAL_STEPS = 718  # of the paper's run; only the schedule's constants depend on it


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


def _batch(family: Family, config: ModelConfig, shape: BatchShape, runtime: Runtime) -> Any:
    """The shapes of a batch, split over the mesh."""
    shapes = jax.eval_shape(partial(family.example_batch, config, shape))
    return _place(shapes, batch_sharding(runtime.mesh))


def train_program(
    cfg: TrainConfig,
    family: Family,
    config: ModelConfig,
    runtime: Runtime,
    sequence_lengths: tuple[int, ...],
) -> Program:
    """The step of a training run on triplets of texts, as train/setup.py makes it.

    ``sequence_lengths`` are the padded lengths of the groups that the batch is split into.

    Raises:
        ValueError: an axis, the batch or the chunks do not divide over the mesh.
    """
    inputs, groups = COLUMNS * cfg.batch_size, len(sequence_lengths)
    multiple = group_multiple(cfg, runtime)
    if inputs % (multiple * groups):
        raise ValueError(
            f"{inputs} sentences a step cannot be split into {groups} groups of parts of "
            f"{multiple} (the devices that share a batch, or chunk_size): take one that divides "
            f"{inputs // groups}"
        )
    model = abstract_model(
        family,
        config,
        precision=train_precision(cfg),
        runtime=runtime,
        lora=cfg.lora,
        load_vision=False,
    )
    parts = make_step(cfg, model, columns=COLUMNS, total_steps=TOTAL_STEPS)
    whole = NamedSharding(runtime.mesh, PartitionSpec())
    numbers = jax.ShapeDtypeStruct((inputs,), jnp.int32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    order, text_ids, key = _place((numbers, numbers, key), whole)
    shapes = [BatchShape(inputs // groups, length) for length in sequence_lengths]
    texts = tuple(_batch(family, config, shape, runtime) for shape in shapes)
    batch = PairBatch(texts, order, text_ids)
    return Program(
        parts.step_fn,
        (parts.trainable, parts.opt_state, parts.frozen, batch, key),
        frozen=parts.frozen,
        trainable=parts.trainable,
        optimizer=parts.opt_state,
    )


def encode_program(
    family: Family,
    config: ModelConfig,
    runtime: Runtime,
    shape: BatchShape,
    *,
    dtype: str,
    quantization: Quantization | None,
) -> Program:
    """The model over one batch of texts or, with a shape key, images, as the encoder runs it."""
    model = abstract_model(
        family,
        config,
        precision=Precision(jnp.dtype(dtype), jnp.dtype(dtype), quantization),
        runtime=runtime,
        load_vision=shape.shape_key > 0,
    )
    graphdef, state = nnx.split(model)
    batch = _batch(family, config, shape, runtime)
    return Program(make_encode_step(graphdef, runtime), (state, batch), frozen=state)
