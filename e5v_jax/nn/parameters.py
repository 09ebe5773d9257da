"""One row per parameter: its name in Hugging Face files, its name here, its shape, its place.

A family's rows (``Family.parameters``) drive all that goes by the name of a parameter: conversion
in both directions, loading, placement on a mesh, PEFT adapters, GGUF files, the count of FLOPs.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import Literal, NamedTuple

import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

Transform = Literal["copy", "transpose", "conv", "conv3d", "batch"]
"""How an array changes on the way in.

torch keeps [out, in], a conv [D, 3, p, p] -> [3*p*p, D], one over two frames [D, 3, 2, p, p] ->
[3*2*p*p, D]; "batch" drops axes of size 1, [1, 1, D].
"""

GROUP = 2**24
"""Parameters that are worth a read or a write of their own: 64 MB in fp32."""


@dataclass(frozen=True)
class Parameter:
    """One row. ``{i}`` in both names is the number of a layer."""

    section: str  # of the checkpoint, a key of ParameterTable.sections
    hf: str  # its Hugging Face name inside the section
    name: str  # in the converted folder; empty for what an embedding never needs
    shape: tuple[int, ...]  # as the module has it, without the layer axis
    spec: P  # which mesh axis splits which axis of the shape
    transform: Transform = "copy"
    layers: int | None = None  # stacked into one array; the leading axis is never split
    unused_layers: int = 0  # that the checkpoint has besides and an embedding never needs
    lora: bool = False  # whether low-rank factors may stand beside it
    optional: bool = False  # whether transformers has it in some models and in others not

    @property
    def path(self) -> str:
        """Where the module has it: the name without the number of the layer."""
        return self.name.replace("{i}.", "")

    @property
    def hf_shape(self) -> tuple[int, ...]:
        """Its shape in the checkpoint."""
        if self.transform in ("conv", "conv3d"):
            frames = () if self.transform == "conv" else (2,)
            patch = math.isqrt(self.shape[0] // 3 // math.prod(frames))
            return (self.shape[1], 3, *frames, patch, patch)
        if self.transform == "batch":
            return (*(1,) * (3 - len(self.shape)), *self.shape)
        return self.shape if self.transform == "copy" else self.shape[::-1]

    def from_hf(self, array: np.ndarray) -> np.ndarray:
        """The checkpoint's array as the module has it."""
        if self.transform in ("copy", "batch"):
            return array.reshape(self.shape)
        return np.ascontiguousarray(array.reshape(array.shape[0], -1).T)

    def to_hf(self, array: np.ndarray) -> np.ndarray:
        """The inverse of :meth:`from_hf`."""
        if self.transform in ("copy", "batch"):
            return array.reshape(self.hf_shape)
        return np.ascontiguousarray(array.T).reshape(self.hf_shape)


class Slot(NamedTuple):
    """One array as it is stored: a parameter, or one layer of a stacked one."""

    row: Parameter
    layer: int | None = None

    @property
    def needed(self) -> bool:
        """Whether embeddings depend on it."""
        return bool(self.row.name) and (self.layer is None or self.layer < (self.row.layers or 0))

    @property
    def name(self) -> str:
        """Its name in the converted folder."""
        return self.row.name.replace("{i}", str(self.layer))

    @property
    def group(self) -> str:
        """The layer that it is read and written with: the unit of memory; else itself."""
        head, layer, _ = self.row.name.partition("{i}")
        return f"{head}{self.layer}" if layer else head

    def key(self, prefixes: Mapping[str, str]) -> str:
        """Its Hugging Face key where each section has the given prefix."""
        return prefixes[self.row.section] + self.row.hf.replace("{i}", str(self.layer))


@dataclass(frozen=True)
class Section:
    """A part of a checkpoint: names inside it are fixed, their prefix differs between layouts."""

    prefixes: tuple[str, ...]  # in the files that people have
    anchors: tuple[str, ...]  # names of which one is always there, by which the prefix is found
    export: str  # the prefix that we write
    renamed: Mapping[str, str] = field(default_factory=dict)  # beginnings in other layouts -> ours


@dataclass(frozen=True)
class ParameterTable:
    """All rows of one model."""

    rows: tuple[Parameter, ...]
    sections: Mapping[str, Section]
    adapter_prefixes: tuple[str, ...]
    """Before ``layers.`` in PEFT adapters: of transformers 5, which we write, then others'."""
    adapter_task: str | None = None  # the ``task_type`` of such an adapter
    ignored: Mapping[str, str] = field(default_factory=dict)
    """Patterns of keys that no row takes, and why no embedding depends on them."""

    @cached_property
    def slots(self) -> tuple[Slot, ...]:
        """Every array that a checkpoint may hold, needed or not."""
        return tuple(
            Slot(row, layer)
            for row in self.rows
            for layer in ([None] if row.layers is None else range(row.layers + row.unused_layers))
        )

    @cached_property
    def stored(self) -> dict[str, Slot]:
        """The arrays that embeddings depend on, by name."""
        return {slot.name: slot for slot in self.slots if slot.needed}

    @cached_property
    def by_path(self) -> dict[str, Parameter]:
        """The rows by where the module has them."""
        return {row.path: row for row in self.rows if row.name}

    @property
    def export_prefixes(self) -> dict[str, str]:
        """The prefix of each section that we write."""
        return {name: section.export for name, section in self.sections.items()}

    @property
    def adapter_prefix(self) -> str:
        """The prefix of adapters that we write."""
        return self.adapter_prefixes[0]

    @property
    def adapted(self) -> list[Parameter]:
        """The rows that take LoRA."""
        return [row for row in self.rows if row.lora]

    def groups(self, names: Iterable[str]) -> list[list[str]]:
        """Stored names to have in memory at a time: those of one layer together, in the order in
        which they first come; small layers :meth:`joined`."""
        found: dict[str, list[str]] = {}
        for name in names:
            found.setdefault(self.stored[name].group, []).append(name)
        return self.joined(found.values())

    def joined(self, parts: Iterable[list[str]]) -> list[list[str]]:
        """Lists of stored names, in order; one of less than ``GROUP`` parameters with the next."""
        groups: list[list[str]] = []
        size = GROUP
        for part in parts:
            if size >= GROUP:
                groups.append([])
                size = 0
            groups[-1] += part
            size += sum(math.prod(self.stored[name].row.shape) for name in part)
        return groups

    def row(self, path: str) -> Parameter:
        """The row of the array at ``path`` of the module. Raises ValueError: there is none."""
        if path not in self.by_path:
            raise ValueError(f"{path}: no row in the family's parameters")
        return self.by_path[path]

    def names(self, path: str) -> list[str]:
        """The stored names of the array at ``path``: one for each layer of a stacked one."""
        row = self.row(path)
        return [Slot(row, i).name for i in ([None] if row.layers is None else range(row.layers))]

    def spec(self, path: str, ndim: int) -> P:
        """The PartitionSpec of the array at ``path``, a parameter or a LoRA factor.

        Raises ValueError: there is no row for it, or the row has another rank than the array.
        """
        base, _, leaf = path.rpartition(".")
        is_factor = leaf in ("lora_a", "lora_b")
        row = self.row(f"{base}.kernel" if is_factor else path)
        axes = tuple(row.spec)
        if is_factor:
            axes = (axes[0], None) if leaf == "lora_a" else (None, axes[1])
        spec = P(*axes) if row.layers is None else P(None, *axes)
        if len(spec) != ndim:
            raise ValueError(f"{path}: spec {spec} has {len(spec)} axes, array has {ndim}")
        return spec

    def sharding(self, path: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
        """The NamedSharding of the array at ``path`` on ``mesh``; an axis of size 1 is never split.

        That is for scales of quantised kernels, which go by the kernel's row. Raises ValueError: as
        :meth:`spec`, or an axis does not divide over its mesh axis.
        """
        spec = self.spec(path, len(shape))
        axes = [None if size == 1 else axis for axis, size in zip(spec, shape, strict=True)]
        for axis, size in zip(axes, shape, strict=True):
            if axis is not None and size % mesh.shape[axis]:
                raise ValueError(
                    f"{path}: shape {list(shape)} cannot be split over {mesh.shape[axis]} devices "
                    f"of mesh axis {axis!r}: choose a size that divides {size}"
                )
        return NamedSharding(mesh, P(*axes))


@cache
def name_pattern(template: str) -> re.Pattern[str]:
    """What matches a name with ``{i}`` in it; the group ``i`` is the number of the layer."""
    return re.compile(re.escape(template).replace(r"\{i\}", r"(?P<i>0|[1-9]\d*)"))


def linear(like: Parameter, *, bias: P | None = None) -> Iterator[Parameter]:
    """The rows of a linear map named as ``like``: its kernel and, placed by ``bias``, that."""
    hf, name = like.hf, like.name
    yield replace(like, hf=f"{hf}.weight", name=f"{name}.kernel", transform="transpose")
    if bias is not None:
        shape = like.shape[1:]
        yield replace(
            like, hf=f"{hf}.bias", name=f"{name}.bias", shape=shape, spec=bias, lora=False
        )


def layer_norm(like: Parameter) -> Iterator[Parameter]:
    """The rows of a layer norm named as ``like``: scale and bias, whole on every device."""
    for theirs, ours in (("weight", "scale"), ("bias", "bias")):
        yield replace(like, hf=f"{like.hf}.{theirs}", name=like.name and f"{like.name}.{ours}")
