"""The real programs of a run with shapes in place of arrays: no weights, no accelerator."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from qwix import QArray

from e5v_jax.checkpoints.loading import build, dotted
from e5v_jax.families.llava_next.model import ImageBatch, LlavaNext, TextBatch
from e5v_jax.nn.attention import compile_for
from e5v_jax.nn.config import ModelConfig
from e5v_jax.nn.layers import Precision
from e5v_jax.nn.quantized import Quantization
from e5v_jax.sharding import batch_sharding, param_sharding
from e5v_jax.train.config import TrainConfig
from e5v_jax.train.optimizer import make_optimizer
from e5v_jax.train.step import PairBatch, make_train_step, split_trainable

COLUMNS = 3  # triplets
TOTAL_STEPS = 718  # of the paper's run; only the schedule's constants depend on it


@dataclass(frozen=True)
class Program:
    """A jitted function, the shapes of its arguments, and which of them are what."""

    function: Any  # a jitted function; jax has no public type for one
    args: tuple[Any, ...]
    frozen: Any  # pytrees of ShapeDtypeStruct, parts of args
    trainable: Any
    optimizer: Any

    def trace(self, platform: str) -> Any:
        """The function traced for the devices in its arguments' shardings, of ``platform``."""
        with compile_for(platform):
            return self.function.trace(*self.args)


def per_device_bytes(tree: Any) -> int:
    """Bytes that the arrays of ``tree`` take on one device; uint4 counts half a byte."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        shape = leaf.sharding.shard_shape(leaf.shape)
        size = 1
        for n in shape:
            size *= n
        bits = 4 if leaf.dtype in (jnp.uint4, jnp.int4) else 8 * leaf.dtype.itemsize
        total += (size * bits + 7) // 8
    return total


def _struct(x: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _array(shape: tuple[int, ...], dtype: Any, sharding: NamedSharding) -> Any:
    """A shape where a batch has an array."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def _place(state: nnx.State, mesh: Mesh) -> nnx.State:
    """Shapes with the sharding that PARAM_RULES gives them; a QArray part by part."""

    def place(path: tuple[object, ...], leaf: nnx.Variable[Any]) -> nnx.Variable[Any]:
        value: jax.Array | QArray = leaf.get_value()
        return leaf.replace(
            jax.tree.map(lambda x: _struct(x, param_sharding(dotted(path), x.shape, mesh)), value)
        )

    return nnx.from_flat_state([(path, place(path, x)) for path, x in nnx.to_flat_state(state)])


def train_program(
    cfg: TrainConfig, model: ModelConfig, mesh: Mesh, sequence_lengths: tuple[int, ...]
) -> Program:
    """The step of a training run, as train/loop.py makes it.

    ``sequence_lengths`` are the padded lengths of the groups that the batch is split into.

    Raises:
        ValueError: an axis, the batch or the chunks do not divide over the mesh.
    """
    dtype = jnp.dtype(cfg.dtype)
    precision = Precision(
        param=dtype if cfg.lora else jnp.float32, compute=dtype, quantization=cfg.quantize
    )
    shapes = jax.eval_shape(
        lambda: build(model, precision=precision, lora=cfg.lora, load_vision=False)
    )
    graphdef, trainable, frozen = split_trainable(shapes, lora=cfg.lora is not None)
    trainable, frozen = _place(trainable, mesh), _place(frozen, mesh)
    optimizer = make_optimizer(cfg.optimizer, TOTAL_STEPS)
    replicated = NamedSharding(mesh, PartitionSpec())
    opt_state = optax.tree_map_params(
        optimizer,
        lambda state, parameter: _struct(state, parameter.sharding),
        jax.eval_shape(optimizer.init, trainable),
        trainable,
        transform_non_params=lambda state: _struct(state, replicated),
    )
    step = make_train_step(
        graphdef,
        optimizer,
        columns=COLUMNS,
        loss=cfg.loss,
        chunk_size=cfg.chunk_size,
        remat=cfg.remat,
        dropout=cfg.lora is not None and cfg.lora.dropout > 0,
        state=(trainable, opt_state),
        mesh=mesh,
    )
    batch = _pair_batch(cfg, mesh, sequence_lengths)
    key = _struct(jax.eval_shape(lambda: jax.random.key(0)), replicated)
    args = (trainable, opt_state, frozen, batch, key)
    return Program(step, args, frozen=frozen, trainable=trainable, optimizer=opt_state)


def _pair_batch(cfg: TrainConfig, mesh: Mesh, sequence_lengths: tuple[int, ...]) -> PairBatch:
    inputs = COLUMNS * cfg.batch_size
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    multiple = cfg.chunk_size or devices
    if multiple % devices:
        raise ValueError(
            f"chunk_size {cfg.chunk_size} cannot be split over the {devices} devices that share a "
            f"batch: make it a multiple of {devices}"
        )
    if inputs % (multiple * len(sequence_lengths)):
        raise ValueError(
            f"{inputs} sentences a step cannot be split into {len(sequence_lengths)} groups of "
            f"parts of {multiple} (the devices that share a batch, or chunk_size): take one that "
            f"divides {inputs // len(sequence_lengths)}"
        )
    rows = inputs // len(sequence_lengths)
    replicated = NamedSharding(mesh, PartitionSpec())
    return PairBatch(
        groups=tuple(_text_batch(rows, length, mesh) for length in sequence_lengths),
        order=_array((inputs,), jnp.int32, replicated),
        text_ids=_array((inputs,), jnp.int32, replicated),
    )


def _text_batch(rows: int, length: int, mesh: Mesh) -> TextBatch:
    split = batch_sharding(mesh)
    return TextBatch(
        _array((rows, length), jnp.int32, split),
        _array((rows,), jnp.int32, split),
    )


def encode_program(
    model: ModelConfig,
    mesh: Mesh,
    *,
    dtype: str,
    quantization: Quantization | None,
    rows: int,
    length: int,
    tiles_per_image: int,
) -> Program:
    """The model over one batch of texts, or with ``tiles_per_image`` of images.

    ``rows`` inputs are padded to ``length`` positions, as encode/encoder.py runs them.
    """
    precision = Precision(jnp.dtype(dtype), jnp.dtype(dtype), quantization)
    shapes = jax.eval_shape(
        lambda: build(model, precision=precision, load_vision=tiles_per_image > 0)
    )
    graphdef, state = nnx.split(shapes)
    state = _place(state, mesh)
    batch: TextBatch | ImageBatch = _text_batch(rows, length, mesh)
    if tiles_per_image:
        assert model.vision is not None
        side = model.vision.image_size
        batch = ImageBatch(
            input_ids=batch.input_ids,
            last_index=batch.last_index,
            image_index=batch.input_ids,
            tiles=_array((rows * tiles_per_image, side, side, 3), jnp.uint8, batch_sharding(mesh)),
        )

    def run(state: nnx.State, batch: TextBatch | ImageBatch) -> jax.Array:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # for sharding.split_batch
            merged: LlavaNext = nnx.merge(graphdef, state)
            return merged.encode(batch)

    return Program(jax.jit(run), (state, batch), frozen=state, trainable=(), optimizer=())
