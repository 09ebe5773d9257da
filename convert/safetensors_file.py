"""Safetensors files written one tensor at a time.

The library's ``save_file`` wants all tensors of a file in memory at once. The format
(github.com/huggingface/safetensors) is small: the header's length as a little-endian u64, a JSON
header with every tensor's dtype, shape and byte range, then the bytes, without gaps.
"""

import json
import struct
from collections.abc import Iterator, Sequence
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


def write_file(path: Path, specs: Sequence[TensorSpec], arrays: Iterator[np.ndarray]) -> None:
    """Write ``arrays``, which come in the order of ``specs``, holding one at a time.

    Raises:
        ValueError: an array is not what its spec says, by name.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers insists on it
    end = 0
    for spec in specs:
        start, end = end, end + spec.nbytes
        header[spec.name] = {
            "dtype": _NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the data is aligned
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for spec in specs:
            array = next(arrays)  # not from zip(), which keeps the one before
            if array.shape != spec.shape or array.dtype != spec.dtype:
                raise ValueError(
                    f"{spec.name}: {array.dtype} {list(array.shape)}, expected {spec.dtype} "
                    f"{list(spec.shape)}"
                )
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            del array  # before the next one is made


def write_model(
    folder: Path,
    specs: Sequence[TensorSpec],
    arrays: Iterator[np.ndarray],
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write ``model.safetensors``, or numbered shards of at most ``shard_bytes`` and their index.

    A tensor larger than ``shard_bytes`` has a shard to itself.
    """
    shards: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in specs:
        if shards[-1] and size + spec.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.nbytes
    if len(shards) == 1:
        write_file(folder / "model.safetensors", specs, arrays)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_file(folder / name, shard, islice(arrays, len(shard)))
        weight_map.update({spec.name: name for spec in shard})
    total = sum(spec.nbytes for spec in specs)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")
