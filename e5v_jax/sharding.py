"""The mesh of devices, and how batches are split over it.

Its axes: ``data`` replicates parameters, ``fsdp`` splits them and the batch, ``tensor`` splits
heads and MLP columns. Which axis splits which parameter is in its row (nn/parameters.py).
"""

from collections.abc import Sequence
from typing import TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

T = TypeVar("T")

MESH_AXES = ("data", "fsdp", "tensor")

BATCH_SPEC = P(("data", "fsdp"))
"""The leading axis of every batch array."""


def make_mesh(
    data: int = 1, fsdp: int = -1, tensor: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A (data, fsdp, tensor) mesh over ``devices`` (default: all), sized by :func:`mesh_shape`."""
    devices = jax.devices() if devices is None else devices
    sizes = mesh_shape(data, fsdp, tensor, len(devices))
    return jax.make_mesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def mesh_shape(data: int, fsdp: int, tensor: int, count: int) -> tuple[int, ...]:
    """The sizes of a mesh, one of which may be -1. Raises ValueError: they do not fit ``count``."""
    sizes = [data, fsdp, tensor]
    if sizes.count(-1) == 1:
        sizes[sizes.index(-1)] = max(count // -(data * fsdp * tensor), 1)
    if sizes[0] * sizes[1] * sizes[2] != count:
        raise ValueError(
            f"mesh data={data} fsdp={fsdp} tensor={tensor} does not fit {count} devices: "
            "the product must equal the number of devices (one size may be -1)"
        )
    return tuple(sizes)


def place_split(tree: T, mesh: Mesh) -> T:
    """Host arrays onto the mesh, split along their first axis; each process its devices' parts."""
    return _place(tree, batch_sharding(mesh))


def place_replicated(tree: T, mesh: Mesh) -> T:
    """Host arrays onto every device of the mesh."""
    return _place(tree, NamedSharding(mesh, P()))


def _place(tree: T, sharding: NamedSharding) -> T:
    placed: T = jax.tree.map(
        lambda x: jax.make_array_from_callback(x.shape, sharding, x.__getitem__), tree
    )
    return placed


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Batch arrays are split along their first axis over ``data`` and ``fsdp``."""
    return NamedSharding(mesh, BATCH_SPEC)


def local_rows(count: int, mesh: Mesh) -> np.ndarray:
    """Which of ``count`` rows of a batch are on devices of this process, bool [count]."""
    held = np.zeros(count, bool)
    parts = batch_sharding(mesh).addressable_devices_indices_map((count,)).values()
    for index in filter(None, parts):
        held[index[0]] = True
    return held
