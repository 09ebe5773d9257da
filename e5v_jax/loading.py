"""From a WeightSource to a sharded model: shapes first, then one stacked parameter at a time."""

import ctypes
import logging
import sys
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from qwix import QArray

from e5v_jax.config import ModelConfig
from e5v_jax.converted import WeightSource
from e5v_jax.model.layers import LoRAConfig, LoRAParam, Precision
from e5v_jax.model.llava_next import LlavaNext
from e5v_jax.model.quantized import Quantization, quantize_with_error
from e5v_jax.sharding import param_sharding

_logger = logging.getLogger(__name__)


def dotted(path: tuple[object, ...]) -> str:
    """``('language_model', 'norm', 'scale')`` -> ``'language_model.norm.scale'``."""
    return ".".join(map(str, path))


def layer_names(path: str, shape: tuple[int, ...]) -> list[str]:
    """Stored names of one parameter: one per layer for a stacked one, else itself."""
    if ".layers." not in path:
        return [path]
    head, tail = path.split(".layers.")
    return [f"{head}.layers.{i}.{tail}" for i in range(shape[0])]


def build(
    cfg: ModelConfig,
    *,
    precision: Precision,
    lora: LoRAConfig | None = None,
    load_vision: bool = True,
    seed: int = 0,
) -> LlavaNext:
    """The module with random parameters; under ``jax.eval_shape`` it costs nothing."""
    return LlavaNext(
        cfg, precision=precision, rngs=nnx.Rngs(seed), lora=lora, load_vision=load_vision
    )


def stored_shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every base parameter as stored: one entry per layer."""
    precision = Precision(param=np.float32, compute=np.float32)
    shapes = jax.eval_shape(lambda: build(cfg, precision=precision))
    return {
        name: tuple(leaf.shape[1:] if ".layers." in dotted(path) else leaf.shape)
        for path, leaf in nnx.to_flat_state(nnx.state(shapes))
        for name in layer_names(dotted(path), leaf.shape)
    }


def check_names(source: WeightSource, expected: Mapping[str, tuple[int, ...]]) -> None:
    """The source has the expected parameters with their shapes, and no others.

    Raises:
        ValueError: the first missing, misshapen or superfluous parameter, by name.
    """
    found = source.shapes()
    for name, shape in expected.items():
        if name not in found:
            raise ValueError(f"{name}: missing from the checkpoint, expected shape {list(shape)}")
        if tuple(found[name]) != tuple(shape):
            raise ValueError(
                f"{name}: shape {list(found[name])} in the checkpoint, expected {list(shape)}"
            )
    for name in found:
        if name not in expected:
            raise ValueError(f"{name}: in the checkpoint, but its config.json has no place for it")


class _Stack:
    """One (stacked) array being filled layer by layer; each device's part is a host buffer."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, sharding: NamedSharding) -> None:
        self._shape, self._sharding = shape, sharding
        self._indices = {
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


def _read_sharded(
    source: WeightSource, path: str, leaf: jax.Array | jax.ShapeDtypeStruct, mesh: Mesh
) -> jax.Array:
    """Read one (stacked) parameter; each device receives only its slice."""
    sharding = param_sharding(path, leaf.shape, mesh)
    stack = _Stack(leaf.shape, np.dtype(leaf.dtype), sharding)
    for i, array in enumerate(source.read(layer_names(path, leaf.shape))):
        stack.put(i if ".layers." in path else None, array)
    return stack.place()


def _read_quantized(
    source: WeightSource, path: str, leaf: QArray, quantization: Quantization, mesh: Mesh
) -> tuple[QArray, float, float]:
    """Read one stacked kernel and quantise it layer by layer; no more is in full precision.

    Also the sums of squares of the error and of the kernel.
    """
    stacks = jax.tree.map(
        lambda part: _Stack(part.shape, part.dtype, param_sharding(path, part.shape, mesh)), leaf
    )
    error = total = 0.0
    for i, array in enumerate(source.read(layer_names(path, leaf.shape))):
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
    *,
    precision: Precision,
    mesh: Mesh,
    lora: LoRAConfig | None = None,
    lora_values: Mapping[str, np.ndarray] | None = None,
    load_vision: bool = True,
    seed: int = 0,
) -> LlavaNext:
    """Fill a model from ``source``, each parameter placed by PARAM_RULES.

    With ``precision.quantization`` the decoder's kernels are quantised while they are read, and the
    error of that is logged.

    ``lora_values`` (dotted path -> fp32 stacked array) sets the LoRA factors; without it they start
    as peft's do (a random from ``seed``, b zero). With ``load_vision`` off, the tower and projector
    are neither read nor placed.

    Raises:
        ValueError: a parameter is missing, superfluous or misshapen, by name.
    """

    def make() -> LlavaNext:
        return build(
            source.config, precision=precision, lora=lora, load_vision=load_vision, seed=seed
        )

    graphdef, lora_shapes, *rest = nnx.split(jax.eval_shape(make), LoRAParam, ...)
    base_shapes = rest[0]
    check_names(source, stored_shapes(source.config))

    error = total = 0.0

    def place(path: tuple[object, ...], leaf: nnx.Variable[jax.Array]) -> nnx.Variable[jax.Array]:
        nonlocal error, total
        name, shape = dotted(path), leaf.get_value()
        if not isinstance(shape, QArray):
            return leaf.replace(_read_sharded(source, name, shape, mesh))
        assert precision.quantization is not None
        kernel, e, t = _read_quantized(source, name, shape, precision.quantization, mesh)
        error, total = error + e, total + t
        return leaf.replace(kernel)

    base = nnx.from_flat_state(
        [(path, place(path, leaf)) for path, leaf in nnx.to_flat_state(base_shapes)]
    )
    _return_freed_memory()
    if precision.quantization is not None:
        _logger.info(
            "%s kernels: relative error %.2f %% (root mean square)",
            precision.quantization,
            100 * (error / total) ** 0.5,
        )
    if lora is None:
        return nnx.merge(graphdef, lora_shapes, base)
    shardings = nnx.from_flat_state(
        [
            (path, leaf.replace(param_sharding(dotted(path), leaf.shape, mesh)))
            for path, leaf in nnx.to_flat_state(lora_shapes)
        ]
    )
    if lora_values is None:
        # jitted, so that the unused base weights of the fresh module are never computed
        factors = jax.jit(lambda: nnx.split(make(), LoRAParam, ...)[1], out_shardings=shardings)()
    else:
        factors = place_lora(lora_shapes, lora_values, mesh)
    return nnx.merge(graphdef, factors, base)


def place_lora(shapes: nnx.State, values: Mapping[str, np.ndarray], mesh: Mesh) -> nnx.State:
    """Put LoRA factors given by dotted path (fp32, stacked over layers) on the mesh.

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
        sharding = param_sharding(name, leaf.shape, mesh)
        array = jax.device_put(np.asarray(values[name], np.float32), sharding)
        placed.append((path, leaf.replace(array)))
    return nnx.from_flat_state(placed)
