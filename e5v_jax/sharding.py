"""Where every array lives: one mesh, one table from parameter path to PartitionSpec.

Models know nothing of meshes. Axes: ``data`` replicates parameters, ``fsdp`` splits them and the
batch, ``tensor`` splits heads and MLP columns.
"""

import re
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

# Stacked layers carry a leading layer axis, never split. First match wins; there is no catch-all.
PARAM_RULES: tuple[tuple[str, P], ...] = (
    # decoder
    (r"language_model\.embed_tokens", P("tensor", "fsdp")),
    (r"language_model\.norm\.scale", P(None)),
    (r"language_model\.layers\..*layernorm\.scale", P(None, None)),
    (r"language_model\.layers\..*(q|k|v|gate|up)_proj\.kernel", P(None, "fsdp", "tensor")),
    (r"language_model\.layers\..*(o|down)_proj\.kernel", P(None, "tensor", "fsdp")),
    (r"language_model\.layers\..*(q|k|v|gate|up)_proj\.lora_a", P(None, "fsdp", None)),
    (r"language_model\.layers\..*(q|k|v|gate|up)_proj\.lora_b", P(None, None, "tensor")),
    (r"language_model\.layers\..*(o|down)_proj\.lora_a", P(None, "tensor", None)),
    (r"language_model\.layers\..*(o|down)_proj\.lora_b", P(None, None, "fsdp")),
    # vision tower
    (r"vision_tower\.class_embedding", P(None)),
    (r"vision_tower\.position_embedding", P(None, None)),
    (r"vision_tower\.patch_embedding\.kernel", P(None, "fsdp")),
    (r"vision_tower\.pre_layrnorm\.(scale|bias)", P(None)),
    (r"vision_tower\.layers\.layer_norm[12]\.(scale|bias)", P(None, None)),
    (r"vision_tower\.layers\..*(q_proj|k_proj|v_proj|fc1)\.kernel", P(None, "fsdp", "tensor")),
    (r"vision_tower\.layers\..*(q_proj|k_proj|v_proj|fc1)\.bias", P(None, "tensor")),
    (r"vision_tower\.layers\..*(out_proj|fc2)\.kernel", P(None, "tensor", "fsdp")),
    (r"vision_tower\.layers\..*(out_proj|fc2)\.bias", P(None, None)),
    # projector
    (r"multi_modal_projector\.linear_1\.kernel", P("fsdp", "tensor")),
    (r"multi_modal_projector\.linear_1\.bias", P("tensor")),
    (r"multi_modal_projector\.linear_2\.kernel", P("tensor", "fsdp")),
    (r"multi_modal_projector\.linear_2\.bias", P(None)),
    (r"image_newline", P(None)),
)


def make_mesh(
    data: int = 1, fsdp: int = -1, tensor: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A (data, fsdp, tensor) mesh over ``devices`` (default: all); one size may be -1.

    Raises:
        ValueError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp, tensor]
    if sizes.count(-1) == 1:
        known = -(data * fsdp * tensor)
        sizes[sizes.index(-1)] = max(len(devices) // known, 1)
    if sizes[0] * sizes[1] * sizes[2] != len(devices):
        raise ValueError(
            f"mesh data={data} fsdp={fsdp} tensor={tensor} does not fit {len(devices)} devices: "
            "the product must equal the number of devices (one size may be -1)"
        )
    return jax.make_mesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def param_spec(path: str, ndim: int) -> P:
    """The PartitionSpec of parameter ``path`` (dotted, as in the converted folder).

    Raises:
        ValueError: no rule matches, or the rule has another rank than the array.
    """
    for pattern, spec in PARAM_RULES:
        if re.fullmatch(pattern, path):
            if len(spec) != ndim:
                raise ValueError(f"{path}: spec {spec} has {len(spec)} axes, array has {ndim}")
            return spec
    raise ValueError(f"{path}: no rule in PARAM_RULES")


def param_sharding(path: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """The NamedSharding of parameter ``path`` on ``mesh``; an axis of size 1 is never split.

    The latter is for the scales of quantised kernels, which go by the kernel's own rule.

    Raises:
        ValueError: as :func:`param_spec`, or an axis does not divide over its mesh axis.
    """
    spec = param_spec(path, len(shape))
    axes = [None if size == 1 else axis for axis, size in zip(spec, shape, strict=True)]
    for axis, size in zip(axes, shape, strict=True):
        if axis is not None and size % mesh.shape[axis]:
            raise ValueError(
                f"{path}: shape {list(shape)} cannot be split over {mesh.shape[axis]} devices of "
                f"mesh axis {axis!r}: choose a size that divides {size}"
            )
    return NamedSharding(mesh, P(*axes))


def place_split(tree: T, mesh: Mesh) -> T:
    """Host arrays onto the mesh, split along their first axis; each process its devices' parts."""
    return _place(tree, batch_sharding(mesh))


def place_replicated(tree: T, mesh: Mesh) -> T:
    """Host arrays onto every device of the mesh."""
    return _place(tree, NamedSharding(mesh, P()))


def _place(tree: T, sharding: NamedSharding) -> T:
    def put(array: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    placed: T = jax.tree.map(put, tree)
    return placed


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Batch arrays are split along their first axis over ``data`` and ``fsdp``."""
    return NamedSharding(mesh, BATCH_SPEC)


def local_rows(count: int, mesh: Mesh) -> np.ndarray:
    """Which of ``count`` rows of a batch are on devices of this process, bool [count]."""
    held = np.zeros(count, bool)
    for index in batch_sharding(mesh).addressable_devices_indices_map((count,)).values():
        if index is not None:
            held[index[0]] = True
    return held


def split_batch(x: jax.Array) -> jax.Array:
    """Keep activations [B, ...] split along the batch, in a program traced under a mesh.

    Without it XLA may split the features instead, as ``fsdp`` splits the weights, and add up every
    matmul's result over all devices: four times the traffic of gathering the weights.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    rest = [P.UNCONSTRAINED] * (x.ndim - 1)
    return jax.lax.with_sharding_constraint(x, P(*BATCH_SPEC, *rest))
