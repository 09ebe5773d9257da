"""From a WeightSource to a sharded model: shapes first, then one stacked parameter at a time."""

import ctypes
import logging
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from qwix import QArray

from e5v_jax.checkpoints.converted import WeightSource
from e5v_jax.checkpoints.finite import store
from e5v_jax.families.base import Family, Model, ModelConfig
from e5v_jax.nn.layers import Build, LoRAParam, Precision
from e5v_jax.nn.quantized import quantize_with_error

_logger = logging.getLogger(__name__)


def dotted(path: tuple[object, ...]) -> str:
    """``('language_model', 'norm', 'scale')`` -> ``'language_model.norm.scale'``."""
    return ".".join(map(str, path))


def abstract_model(
    family: Family,
    config: ModelConfig,
    build: Build,
    *,
    load_vision: bool = True,
    masters: tuple[str, ...] = (),
) -> Model:
    """The module with shapes in place of arrays, each with the sharding that its row gives it.

    What is at one of the paths ``masters`` or below it is stored in fp32 whatever ``build`` says.
    """
    module = jax.eval_shape(
        lambda: family.build(config, build, rngs=nnx.Rngs(0), load_vision=load_vision)
    )
    table = family.parameters(config)
    graphdef, state = nnx.split(module)

    def place(path: tuple[object, ...], x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        sharding = table.sharding(dotted(path), x.shape, build.runtime.mesh)
        is_master = any(f"{dotted(path)}.".startswith(f"{master}.") for master in masters)
        return jax.ShapeDtypeStruct(
            x.shape, jnp.float32 if is_master else x.dtype, sharding=sharding
        )

    placed = [  # a quantised kernel is several arrays
        (path, leaf.replace(jax.tree.map(partial(place, path), leaf.get_value())))
        for path, leaf in nnx.to_flat_state(state)
    ]
    model: Model = nnx.merge(graphdef, nnx.from_flat_state(placed))
    return model


def _check_shapes(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], where: str
) -> None:
    for name, shape in expected.items():
        if name not in found:
            raise ValueError(f"{name}: missing from the {where}, expected shape {list(shape)}")
        if (has := tuple(found[name])) != shape:
            raise ValueError(f"{name}: shape {list(has)} in the {where}, expected {list(shape)}")
    for name in found:
        if name not in expected:
            raise ValueError(f"{name}: in the {where}, but the model's config has no place for it")


class _Stack:
    """One (stacked) array being filled layer by layer; each device's part is a host buffer."""

    def __init__(self, leaf: jax.ShapeDtypeStruct) -> None:
        self._leaf = leaf
        indices = leaf.sharding.addressable_devices_indices_map(leaf.shape).values()
        # None is jax's word for the whole of a scalar; several devices may hold the same part
        self._indices: dict[str, tuple[slice, ...]] = {str(i or ()): i or () for i in indices}
        part = leaf.sharding.shard_shape(leaf.shape)
        self._buffers = {key: np.empty(part, leaf.dtype) for key in self._indices}

    def put(self, layer: int | None, array: np.ndarray, name: str) -> None:
        """Copy one layer, or with None the whole array, cast to the storage dtype.

        Raises ValueError, naming the array: a value is too large for the dtype.
        """
        for key, index in self._indices.items():
            if layer is None:
                store(array[index], self._buffers[key], ..., name)
            elif layer in (held := range(*index[0].indices(self._leaf.shape[0]))):
                store(array[index[1:]], self._buffers[key], layer - held.start, name)

    def place(self) -> jax.Array:
        """The array on its devices."""
        return jax.make_array_from_callback(
            self._leaf.shape, self._leaf.sharding, lambda index: self._buffers[str(index or ())]
        )


def _read(
    source: WeightSource, paths: Sequence[str]
) -> Iterator[tuple[int | None, str, np.ndarray]]:
    """Layer (None of what is not stacked), name and array of all that is at ``paths``, in order.

    Small parameters are read together.
    """
    table = source.table
    for names in table.joined(table.names(path) for path in paths):
        for name, array in zip(names, source.read(names), strict=True):
            yield table.stored[name].layer, name, array


def _put(layer: int | None, name: str, stack: _Stack, array: Any) -> None:
    stack.put(layer, np.asarray(array), name)


def _fill(
    parts: Iterable[tuple[int | None, str, np.ndarray]],
    leaf: jax.ShapeDtypeStruct | QArray,
    precision: Precision,
) -> tuple[Any, np.ndarray]:
    """Fill one (stacked) parameter; each device receives only its slice.

    ``parts`` are its layers, by number, or the whole, by None, with their names. A :class:`QArray`
    is quantised layer by layer: no more is in full precision. Also the sums of squares of the error
    of that and of the kernel, fp64 [2].

    Raises ValueError: a value is not finite or too large for the dtype, naming the parameter.
    """
    stacks, squares = jax.tree.map(_Stack, leaf), np.zeros(2)
    part: Any
    for layer, name, part in parts:
        if isinstance(leaf, QArray):
            assert precision.quantization is not None
            part, *sums = quantize_with_error(jnp.asarray(part), precision.quantization)
            squares += np.array(sums, np.float64)
        jax.tree.map(partial(_put, layer, name), stacks, part)
    return jax.tree.map(_Stack.place, stacks), squares


def load_model(
    source: WeightSource,
    build: Build,
    *,
    lora_values: Mapping[str, np.ndarray] | None = None,
    load_vision: bool = True,
    masters: tuple[str, ...] = (),
    seed: int = 0,
) -> Any:
    """Fill a model from ``source``, each parameter placed as its row says.

    The decoder's kernels are quantised while they are read, if ``build`` says so; the error of that
    is logged. ``lora_values`` (dotted path -> fp32 stacked array) sets the LoRA factors; without it
    they start as peft's do (a random from ``seed``, b zero). With ``load_vision`` off, the tower
    and projector are neither read nor placed. ``masters`` are as in :func:`abstract_model`.

    Raises ValueError: a parameter is missing, superfluous or misshapen, or has a value that is not
    finite, or not in the dtype of the model; by name.
    """
    shapes = abstract_model(
        source.family, source.config, build, load_vision=load_vision, masters=masters
    )
    graphdef, lora_shapes, *base_shapes = nnx.split(shapes, LoRAParam, ...)
    table = source.family.parameters(source.config)
    expected = {name: slot.row.shape for name, slot in table.stored.items()}
    _check_shapes(source.shapes(), expected, "checkpoint")
    placed, squares = [], np.zeros(2)
    parameters = nnx.to_flat_state(base_shapes[0])
    read = _read(source, [dotted(path) for path, _ in parameters])
    for path, leaf in parameters:
        parts = islice(read, len(source.table.names(dotted(path))))
        value, sums = _fill(parts, leaf.get_value(), build.precision)
        placed.append((path, leaf.replace(value)))
        squares += sums
    base = nnx.from_flat_state(placed)
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # not in musl
        libc.malloc_trim(0)  # glibc keeps what reading has freed: 170 MB of a 740 MB model
    if (kind := build.precision.quantization) is not None:
        error = 100 * (squares[0] / squares[1]) ** 0.5
        _logger.info("%s kernels: relative error %.2f %% (root mean square)", kind, error)
    if build.lora is None:
        return nnx.merge(graphdef, base)
    if lora_values is not None:
        leaves = nnx.to_flat_state(lora_shapes)
        wanted = {dotted(path): leaf.shape for path, leaf in leaves}
        _check_shapes({name: x.shape for name, x in lora_values.items()}, wanted, "adapter")
        lora = []
        for path, leaf in leaves:
            factor = np.asarray(lora_values[dotted(path)], np.float32)
            lora.append((path, leaf.replace(jax.device_put(factor, leaf.get_value().sharding))))
        return nnx.merge(graphdef, nnx.from_flat_state(lora), base)

    def fresh() -> nnx.State:
        module = source.family.build(
            source.config, build, rngs=nnx.Rngs(seed), load_vision=load_vision
        )
        return nnx.split(module, LoRAParam, ...)[1]

    # jitted, so that the unused base weights of the fresh module are never computed
    shardings = jax.tree.map(lambda x: x.sharding, lora_shapes)
    return nnx.merge(graphdef, jax.jit(fresh, out_shardings=shardings)(), base)
