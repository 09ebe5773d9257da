"""Safetensors files written one tensor at a time.

The library's ``save_file`` wants all tensors of a file in memory at once. The format
(github.com/huggingface/safetensors) is small: the header's length as a little-endian u64, a JSON
header with every tensor's dtype, shape and byte range, then the bytes, without gaps.
"""

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import ml_dtypes  # ships with jax; gives NumPy its bfloat16
import numpy as np

DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""Dtypes of weights, by their safetensors names."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000  # the size Hugging Face shards have


@dataclass(frozen=True)
class TensorSpec:
    """What must be known of a tensor before its file is begun."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        """Size in the file."""
        return int(np.prod(self.shape)) * self.dtype.itemsize


def header(specs: Sequence[TensorSpec]) -> bytes:
    """The start of a file with the given tensors, up to the first tensor's bytes."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers insists on it
    end = 0
    for spec in specs:
        start, end = end, end + spec.nbytes
        entries[spec.name] = {
            "dtype": _NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)  # so that the data is aligned
    return struct.pack("<Q", len(text)) + text


def write_file(path: Path, specs: Sequence[TensorSpec], arrays: Iterator[np.ndarray]) -> None:
    """Write ``arrays``, which come in the order of ``specs``, holding one at a time.

    Raises:
        ValueError: an array is not what its spec says, by name.
    """
    with path.open("wb") as file:
        file.write(header(specs))
        for spec in specs:
            array = next(arrays)  # not from zip(), which keeps the one before
            if array.shape != spec.shape or array.dtype != spec.dtype:
                raise ValueError(
                    f"{spec.name}: {array.dtype} {list(array.shape)}, expected {spec.dtype} "
                    f"{list(spec.shape)}"
                )
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            del array  # before the next one is made


def split_shards(specs: Sequence[TensorSpec], shard_bytes: int) -> dict[str, list[TensorSpec]]:
    """File names and their tensors, in order; a tensor above ``shard_bytes`` has its own file."""
    shards: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in specs:
        if shards[-1] and size + spec.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.nbytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {
        f"model-{number:05}-of-{len(shards):05}.safetensors": shard
        for number, shard in enumerate(shards, start=1)
    }


def write_index(folder: Path, shards: Mapping[str, Sequence[TensorSpec]]) -> None:
    """Write the index of several shards: which file has which tensor."""
    weight_map = {spec.name: name for name, shard in shards.items() for spec in shard}
    total = sum(spec.nbytes for shard in shards.values() for spec in shard)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")


def write_model(
    folder: Path,
    specs: Sequence[TensorSpec],
    arrays: Iterator[np.ndarray],
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write ``model.safetensors``, or shards of at most ``shard_bytes`` and their index."""
    shards = split_shards(specs, shard_bytes)
    for name, shard in shards.items():
        write_file(folder / name, shard, islice(arrays, len(shard)))
    if len(shards) > 1:
        write_index(folder, shards)
