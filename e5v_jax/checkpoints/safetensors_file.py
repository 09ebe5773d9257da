"""Safetensors files read and written one tensor at a time.

The library's ``save_file`` wants all tensors of a file in memory at once. The format is small: the
header's length as a little-endian u64, a JSON header with every tensor's dtype, shape and byte
range, then the bytes, without gaps.
"""

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # ships with jax; gives NumPy its bfloat16
import numpy as np
import safetensors

from e5v_jax.checkpoints.json_file import read_json

# Dtypes of weights, by their safetensors names.
DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}

INDEX = "model.safetensors.index.json"


class TensorSpec(NamedTuple):
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
    names, end = {dtype: name for name, dtype in DTYPES.items()}, 0
    for spec in specs:
        span = [end, end := end + spec.nbytes]
        entry = {"dtype": names[spec.dtype], "shape": list(spec.shape), "data_offsets": span}
        entries[spec.name] = entry
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)  # so that the data is aligned
    return struct.pack("<Q", len(text)) + text


def write_file(path: Path, specs: Sequence[TensorSpec], arrays: Iterator[np.ndarray]) -> None:
    """Write ``arrays``, in the order of ``specs``, one by one. Raises ValueError: one differs."""
    with path.open("wb") as file:
        file.write(header(specs))
        for spec in specs:
            array = next(arrays)  # not from zip(), which keeps the one before
            found, expected = (f"{x.dtype} {list(x.shape)}" for x in (array, spec))
            if found != expected:
                raise ValueError(f"{spec.name}: {found}, expected {expected}")
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            del array  # before the next one is made


def split_shards(specs: Sequence[TensorSpec], shard_bytes: int) -> dict[str, list[TensorSpec]]:
    """File names and their tensors, in order; a tensor above ``shard_bytes`` has its own file."""
    shards: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in specs:
        size += spec.nbytes
        if shards[-1] and size > shard_bytes:
            shards.append([])
            size = spec.nbytes
        shards[-1].append(spec)
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    names = (f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards)))
    return dict(zip(names, shards, strict=True))


def write_index(folder: Path, shards: Mapping[str, Sequence[TensorSpec]]) -> None:
    """Write the file that says which shard holds which tensor."""
    weight_map = {spec.name: name for name, shard in shards.items() for spec in shard}
    total = sum(spec.nbytes for shard in shards.values() for spec in shard)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")


def write_model(
    folder: Path, specs: Sequence[TensorSpec], arrays: Iterator[np.ndarray], shard_bytes: int
) -> None:
    """Write ``model.safetensors``, or shards of at most ``shard_bytes`` and their index."""
    shards = split_shards(specs, shard_bytes)
    for name, shard in shards.items():
        write_file(folder / name, shard, islice(arrays, len(shard)))
    if len(shards) > 1:
        write_index(folder, shards)


def _read_index(index: Path) -> dict[str, str]:
    """The shard of each key, empty without an index. Raises ValueError: it is damaged."""
    if not index.exists():
        return {}
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f'{index}: damaged, no "weight_map" of keys and files; fetch it again')
    for key, name in weight_map.items():
        if not isinstance(name, str) or Path(name).name != name:  # nothing beyond the folder
            raise ValueError(f"{index}: damaged, {key} is in {name!r}; fetch it again")
    return weight_map


def read_tensors(file: Path) -> dict[str, np.ndarray]:
    """All tensors of a small file, here or in a bucket, by name in order.

    Raises ValueError: damaged, or a dtype that weights do not have.
    """
    try:
        # the library's own numpy.load knows no bfloat16
        entries = sorted(safetensors.deserialize(file.read_bytes()), key=lambda entry: entry[0])
    except safetensors.SafetensorError as error:
        raise _damaged(file, error) from error
    return {
        name: np.frombuffer(entry["data"], _dtype(entry["dtype"], f"{file}: {name}")).reshape(
            entry["shape"]
        )
        for name, entry in entries
    }


def _damaged(file: Path, error: Exception) -> ValueError:
    return ValueError(f"{file}: damaged or truncated ({error}); fetch it again")


def _dtype(kind: str, name: str) -> np.dtype[Any]:
    if kind not in DTYPES:  # as old files keep position_ids, which nobody reads
        raise ValueError(f"{name}: dtype {kind}, expected one of {sorted(DTYPES)}")
    return DTYPES[kind]


class SafetensorsFolder:
    """A folder with one or several ``*.safetensors``, whose tensors are read one at a time."""

    def __init__(self, folder: Path) -> None:
        """Read every shard's header.

        Raises:
            FileNotFoundError: no safetensors, or a shard that the index names is missing.
            ValueError: a damaged shard or index, a key in two shards or not in the one that the
                index names, only pickled ``.bin`` weights.
        """
        weight_map = _read_index(folder / INDEX)
        if weight_map:
            files = sorted({folder / name for name in weight_map.values()})
        elif (folder / "model.safetensors").is_file():
            files = [folder / "model.safetensors"]  # others beside it hold something else
        else:
            files = sorted(folder.glob("*.safetensors"))
        if not files:
            if any(folder.glob("*.bin")) or any(folder.glob("*.pth")):
                raise ValueError(
                    f"{folder}: only pickled .bin weights, which can run code when loaded; save "
                    "the model as safetensors first (save_pretrained in transformers)"
                )
            raise FileNotFoundError(f"{folder}: no *.safetensors file")
        self._files: dict[str, Path] = {}
        self._specs: dict[str, tuple[tuple[int, ...], str]] = {}  # shape and dtype
        for file in files:
            self._open(file)
        for key, name in weight_map.items():
            if self._files.get(key) != folder / name:
                raise ValueError(f"{folder / name}: {key} is not in this file, but {INDEX} says so")

    def _open(self, file: Path) -> None:
        if not file.is_file():  # opening a pipe would wait for ever
            what = "not a file" if file.exists() else f"missing, but {INDEX} names it"
            raise FileNotFoundError(f"{file}: {what}")
        file.open("rb").close()  # safetensors says of one without permission that it is not there
        try:
            with safetensors.safe_open(file, framework="numpy") as handle:
                for key in handle.keys():  # noqa: SIM118 (safe_open is no mapping)
                    if key in self._files:
                        raise ValueError(f"{file}: {key} is in {self._files[key].name} too")
                    view = handle.get_slice(key)
                    self._files[key] = file
                    self._specs[key] = tuple(view.get_shape()), view.get_dtype()
        except safetensors.SafetensorError as error:
            raise _damaged(file, error) from error

    def keys(self) -> list[str]:
        """Hugging Face names."""
        return list(self._files)

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of one tensor."""
        return self._specs[key][0]

    def dtype(self, key: str) -> np.dtype[Any]:
        """Dtype of one tensor. Raises ValueError: not a dtype of weights."""
        return _dtype(self._specs[key][1], key)

    def read(self, key: str) -> np.ndarray:
        """One tensor; only its bytes are read. Raises ValueError: the file has become shorter."""
        file = self._files[key]
        try:
            # opened anew each time: an open file would keep all pages it has read in memory
            with safetensors.safe_open(file, framework="numpy") as handle:
                return np.asarray(handle.get_tensor(key))
        except safetensors.SafetensorError as error:
            raise _damaged(file, error) from error
