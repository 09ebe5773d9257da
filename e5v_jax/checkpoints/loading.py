"""From a WeightSource to a sharded model: shapes first, then one stacked parameter at a time."""

import ctypes
import logging
import sys
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from qwix import QArray

from e5v_jax.checkpoints.converted import WeightSource
from e5v_jax.families.base import Family, Model, ModelConfig
from e5v_jax.nn.layers import Build, LoRAParam
from e5v_jax.nn.parameters import ParameterTable
from e5v_jax.nn.quantized import Quantization, quantize_with_error

_logger = logging.getLogger(__name__)


def dotted(path: tuple[object, ...]) -> str:
    """``('language_model', 'norm', 'scale')`` -> ``'language_model.norm.scale'``."""
    return ".".join(map(str, path))


def abstract_model(
    family: Family, config: ModelConfig, build: Build, *, load_vision: bool = True
) -> Model:
    """The module with shapes in place of arrays, each with the sharding that its row gives it."""
    module = jax.eval_shape(
        lambda: family.build(config, build, rngs=nnx.Rngs(0), load_vision=load_vision)
    )
    table = family.parameters(config)
    graphdef, state = nnx.split(module)

    def place(path: tuple[object, ...], leaf: nnx.Variable[Any]) -> nnx.Variable[Any]:
        def put(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            sharding = table.sharding(dotted(path), x.shape, build.runtime.mesh)
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

        return leaf.replace(jax.tree.map(put, leaf.get_value()))

    placed = nnx.from_flat_state([(path, place(path, x)) for path, x in nnx.to_flat_state(state)])
    model: Model = nnx.merge(graphdef, placed)
    return model


def check_names(source: WeightSource, table: ParameterTable) -> None:
    """See that the source has the parameters of ``table`` with their shapes, and no others.

    Raises:
        ValueError: the first missing, misshapen or superfluous parameter, by name.
    """
    found, expected = source.shapes(), table.stored
    for name, slot in expected.items():
        if name not in found:
            raise ValueError(
                f"{name}: missing from the checkpoint, expected shape {list(slot.row.shape)}"
            )
        if tuple(found[name]) != slot.row.shape:
            raise ValueError(
                f"{name}: shape {list(found[name])} in the checkpoint, expected "
                f"{list(slot.row.shape)}"
            )
    for name in found:
        if name not in expected:
            raise ValueError(f"{name}: in the checkpoint, but its config.json has no place for it")


class _Stack:
    """One (stacked) array being filled layer by layer; each device's part is a host buffer."""

    def __init__(self, leaf: jax.ShapeDtypeStruct) -> None:
        shape, dtype, sharding = leaf.shape, np.dtype(leaf.dtype), leaf.sharding
        self._shape, self._sharding = shape, sharding
        self._indices: dict[jax.Device, tuple[slice, ...]] = {
            device: index or ()  # None is jax's word for the whole of a scalar
            for device, index in sharding.addressable_devices_indices_map(shape).items()
        }
        self._distinct = {str(index): index for index in self._indices.values()}
        self._buffers = {
            key: np.empty(
                [len(range(*s.indices(n))) for s, n in zip(index, shape, strict=True)], dtype
            )
            for key, index in self._distinct.items()
        }

    def put(self, layer: int | None, array: np.ndarray) -> None:
        """Copy one layer, or with None the whole array; the cast to the storage dtype is here."""
        for key, index in self._distinct.items():
            if layer is None:
                self._buffers[key][...] = array[index]
            elif layer in range(*index[0].indices(self._shape[0])):
                start = index[0].indices(self._shape[0])[0]
                self._buffers[key][layer - start] = array[index[1:]]

    def place(self) -> jax.Array:
        """The array on its devices."""
        shards = [
            jax.device_put(self._buffers[str(index)], device)
            for device, index in self._indices.items()
        ]
        return jax.make_array_from_single_device_arrays(self._shape, self._sharding, shards)


def _read_sharded(source: WeightSource, path: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    """Read one (stacked) parameter; each device receives only its slice."""
    stack = _Stack(leaf)
    stacked = source.table.row(path).layers is not None
    for i, array in enumerate(source.read(source.table.names(path))):
        stack.put(i if stacked else None, array)
    return stack.place()


def _read_quantized(
    source: WeightSource, path: str, leaf: QArray, quantization: Quantization
) -> tuple[QArray, float, float]:
    """Read one stacked kernel and quantise it layer by layer; no more is in full precision.

    Also the sums of squares of the error and of the kernel.
    """
    stacks = jax.tree.map(_Stack, leaf)
    error = total = 0.0
    for i, array in enumerate(source.read(source.table.names(path))):
        layer, layer_error, layer_total = quantize_with_error(jnp.asarray(array), quantization)
        error, total = error + float(layer_error), total + float(layer_total)
        jax.tree.map(lambda stack, part, i=i: stack.put(i, np.asarray(part)), stacks, layer)
    return jax.tree.map(_Stack.place, stacks), error, total


def _return_freed_memory() -> None:
    """Hand what reading has freed back to the system: glibc keeps it, 170 MB of a 740 MB model."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):  # not in musl
            libc.malloc_trim(0)


def load_model(
    source: WeightSource,
    build: Build,
    *,
    lora_values: Mapping[str, np.ndarray] | None = None,
    load_vision: bool = True,
    seed: int = 0,
) -> Any:
    """Fill a model from ``source``, each parameter placed as its row says.

    With a quantisation in ``build`` the decoder's kernels are quantised while they are read; the
    error of that is logged.

    ``lora_values`` (dotted path -> fp32 stacked array) sets the LoRA factors; without it they start
    as peft's do (a random from ``seed``, b zero). With ``load_vision`` off, the tower and projector
    are neither read nor placed.

    Raises:
        ValueError: a parameter is missing, superfluous or misshapen, by name.
    """
    shapes = abstract_model(source.family, source.config, build, load_vision=load_vision)
    quantization = build.precision.quantization
    graphdef, lora_shapes, *rest = nnx.split(shapes, LoRAParam, ...)
    check_names(source, source.family.parameters(source.config))

    error = total = 0.0

    def read(path: tuple[object, ...], leaf: nnx.Variable[Any]) -> nnx.Variable[Any]:
        nonlocal error, total
        name, shape = dotted(path), leaf.get_value()
        if not isinstance(shape, QArray):
            return leaf.replace(_read_sharded(source, name, shape))
        assert quantization is not None
        kernel, e, t = _read_quantized(source, name, shape, quantization)
        error, total = error + e, total + t
        return leaf.replace(kernel)

    base = nnx.from_flat_state([(path, read(path, x)) for path, x in nnx.to_flat_state(rest[0])])
    _return_freed_memory()
    if quantization is not None:
        _logger.info(
            "%s kernels: relative error %.2f %% (root mean square)",
            quantization,
            100 * (error / total) ** 0.5,
        )
    if build.lora is None:
        return nnx.merge(graphdef, base)
    if lora_values is not None:
        return nnx.merge(graphdef, place_lora(lora_shapes, lora_values), base)

    def fresh() -> nnx.State:
        module = source.family.build(
            source.config, build, rngs=nnx.Rngs(seed), load_vision=load_vision
        )
        return nnx.split(module, LoRAParam, ...)[1]

    # jitted, so that the unused base weights of the fresh module are never computed
    shardings = jax.tree.map(lambda x: x.sharding, lora_shapes)
    return nnx.merge(graphdef, jax.jit(fresh, out_shardings=shardings)(), base)


def place_lora(shapes: nnx.State, values: Mapping[str, np.ndarray]) -> nnx.State:
    """Put LoRA factors given by dotted path (fp32, stacked over layers) where ``shapes`` say.

    Raises:
        ValueError: a factor is missing, superfluous or misshapen, by name.
    """
    flat = {dotted(path): (path, leaf) for path, leaf in nnx.to_flat_state(shapes)}
    if set(flat) != set(values):
        name = min(set(flat) ^ set(values))
        raise ValueError(f"{name}: {'missing from' if name in flat else 'unknown in'} the adapter")
    placed = []
    for name, (path, leaf) in flat.items():
        if tuple(values[name].shape) != tuple(leaf.shape):
            raise ValueError(
                f"{name}: shape {list(values[name].shape)} in the adapter, "
                f"expected {list(leaf.shape)}"
            )
        array = jax.device_put(np.asarray(values[name], np.float32), leaf.get_value().sharding)
        placed.append((path, leaf.replace(array)))
    return nnx.from_flat_state(placed)
