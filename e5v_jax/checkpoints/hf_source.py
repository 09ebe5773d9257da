"""Hugging Face checkpoints as a WeightSource: safetensors folders of any layout, and GGUF files."""

import json
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import safetensors

from e5v_jax.checkpoints.gguf import GGUFTensors, read_config
from e5v_jax.checkpoints.names import map_keys
from e5v_jax.checkpoints.safetensors_file import DTYPES, INDEX
from e5v_jax.checkpoints.tokenizer import read_preprocessor
from e5v_jax.families import find_family
from e5v_jax.families.base import Family, ModelConfig
from e5v_jax.nn.config import UnsupportedModelError
from e5v_jax.storage import as_path, in_bucket


class TensorReader(Protocol):
    """Named tensors in Hugging Face's orientation, read one at a time."""

    def keys(self) -> list[str]:
        """Hugging Face names."""
        ...

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of one tensor."""
        ...

    def dtype(self, key: str) -> np.dtype[Any]:
        """Dtype of one tensor."""
        ...

    def read(self, key: str) -> np.ndarray:
        """One tensor."""
        ...


class SafetensorsFolder:
    """A folder with one or several ``*.safetensors``."""

    def __init__(self, folder: Path) -> None:
        """Open every shard's header.

        Raises:
            FileNotFoundError: no safetensors, or a shard that the index names is missing.
            ValueError: a damaged shard or index, a key in two shards or not in the one that the
                index names, only pickled ``.bin`` weights.
        """
        self.folder = folder
        index = folder / INDEX
        weight_map = _read_weight_map(index) if index.is_file() else {}
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
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._kinds: dict[str, str] = {}
        for file in files:
            self._open(file)
        for key, name in weight_map.items():
            if self._files.get(key) != folder / name:
                raise ValueError(f"{folder / name}: {key} is not in this file, but {INDEX} says so")

    def _open(self, file: Path) -> None:
        if not file.is_file():
            raise FileNotFoundError(f"{file}: missing, but {INDEX} names it")
        try:
            with safetensors.safe_open(file, framework="numpy") as handle:
                for key in handle.keys():  # noqa: SIM118 (safe_open is no mapping)
                    view = handle.get_slice(key)
                    if key in self._files:
                        raise ValueError(f"{file}: {key} is in {self._files[key].name} too")
                    self._files[key] = file
                    self._shapes[key] = tuple(view.get_shape())
                    self._kinds[key] = view.get_dtype()
        except safetensors.SafetensorError as error:
            raise ValueError(f"{file}: damaged or truncated ({error}); fetch it again") from error

    def keys(self) -> list[str]:
        """Hugging Face names."""
        return list(self._files)

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of one tensor."""
        return self._shapes[key]

    def dtype(self, key: str) -> np.dtype[Any]:
        """Dtype of one tensor.

        Raises:
            ValueError: not a dtype of weights.
        """
        if self._kinds[key] not in DTYPES:  # as old files keep position_ids, which nobody reads
            raise ValueError(f"{key}: dtype {self._kinds[key]}, expected one of {sorted(DTYPES)}")
        return DTYPES[self._kinds[key]]

    def read(self, key: str) -> np.ndarray:
        """One tensor; only its bytes are read."""
        # opened anew each time: an open file would keep all pages it has read in memory
        with safetensors.safe_open(self._files[key], framework="numpy") as handle:
            return np.asarray(handle.get_tensor(key))


def _read_weight_map(index: Path) -> dict[str, str]:
    """Key -> file name, of a shard index."""
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        return {str(key): str(name) for key, name in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: damaged ({error!r}); fetch it again") from error


def read_architecture(path: Path, raw: dict[str, Any]) -> tuple[Family, ModelConfig]:
    """Family and configuration of a checkpoint at ``path`` with the parsed ``config.json`` ``raw``.

    Raises:
        UnsupportedModelError: it asks for something that is not computed here; names the file.
        ValueError: it is no valid configuration; names the file.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        family = find_family(raw)
        config = family.read_config(raw)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{file}: {error}") from error
    except Exception as error:  # transformers' configuration classes raise many types
        reason = textwrap.shorten(str(error), 200)  # some list every architecture there is
        raise ValueError(f"{file}: not a valid configuration: {reason}") from error
    check_preprocessor(path, family, config)
    return family, config


def check_preprocessor(folder: Path, family: Family, config: ModelConfig) -> None:
    """Refuse an image processor in ``folder`` that does something else than is computed here.

    Raises:
        UnsupportedModelError: names file and setting.
    """
    for file, settings in read_preprocessor(folder):
        try:
            family.check_preprocessor(config, settings)
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"{file}: {error}") from error


class HfSource:
    """A Hugging Face checkpoint under our names (a :class:`WeightSource`)."""

    def __init__(self, path: Path, tensors: TensorReader, raw_config: dict[str, Any]) -> None:
        """Map every key, and compare every shape with what the configuration asks for.

        ``path`` is the folder or file, for messages.

        Raises:
            ValueError: an unsupported architecture, a key that no row knows or that is one too
                many, a missing key or a wrong shape or dtype, by its name in the checkpoint.
        """
        self.tensors = tensors
        self.raw_config = raw_config
        self.family, self.config = read_architecture(path, raw_config)
        self.table = self.family.parameters(self.config)
        try:
            self.key_map = map_keys(tensors.keys(), self.table)
            self._keys = {slot.name: key for key, slot in self.key_map.slots.items() if slot.needed}
            self._check_shapes()
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def _check_shapes(self) -> None:
        places = set(self.table.slots)
        for name, slot in self.table.stored.items():
            if name not in self._keys:
                key, shape = slot.key(self.key_map.prefixes), list(slot.row.hf_shape)
                raise ValueError(f"{key}: missing; the configuration asks for it, shape {shape}")
        for key, slot in self.key_map.slots.items():
            if slot not in places:
                raise ValueError(f"{key}: one too many; the configuration has no place for it")
            self.tensors.dtype(key)
            if self.tensors.shape(key) != slot.row.hf_shape:
                raise ValueError(
                    f"{key}: shape {list(self.tensors.shape(key))}, the configuration asks for "
                    f"{list(slot.row.hf_shape)}"
                )

    def dtype(self) -> np.dtype[Any]:
        """The narrowest dtype that holds every tensor exactly."""
        kinds = {self.tensors.dtype(key) for key in self._keys.values()}
        return kinds.pop() if len(kinds) == 1 else np.dtype(np.float32)

    def unused(self) -> dict[str, str]:
        """Keys that only an export needs, and the keys it will write."""
        prefixes = self.table.export_prefixes
        return {k: slot.key(prefixes) for k, slot in self.key_map.slots.items() if not slot.needed}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Our parameter names and shapes."""
        return {name: self.table.stored[name].row.shape for name in self._keys}

    def read(self, names: Sequence[str]) -> Iterator[np.ndarray]:
        """The named parameters in order, in our orientation and the source's dtype."""
        for name in names:
            yield self.table.stored[name].row.from_hf(self.tensors.read(self._keys[name]))


def resolve(source: str, revision: str | None = None) -> Path:
    """A local folder or GGUF file as it is; else a Hugging Face hub id, fetched.

    Raises:
        FileNotFoundError: neither a local path nor a repository that can be fetched.
    """
    path = as_path(source)
    if path.exists():
        return path
    if source.count("/") != 1 or source.startswith((".", "/", "~", "gs:")):
        raise FileNotFoundError(f"{source}: no such folder or file")
    import huggingface_hub  # only for hub ids: it is slow to import

    try:
        return Path(
            huggingface_hub.snapshot_download(
                source,
                revision=revision,
                allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"],
            )
        )
    except Exception as error:  # network, authentication and missing repositories: many types
        raise FileNotFoundError(
            f"{source}: no such folder, and not fetched from the Hugging Face hub: "
            f"{str(error).strip().splitlines()[0]}"
        ) from error


def open_source(path: Path) -> HfSource:
    """Open a Hugging Face folder or a GGUF file.

    Raises:
        FileNotFoundError: no config.json or weights.
        ValueError: in a bucket; as :class:`HfSource` and :class:`SafetensorsFolder` say.
    """
    if in_bucket(path):
        raise ValueError(
            f"{path}: only a converted folder can be read from a bucket; fetch it, then run "
            "e5v-convert"
        )
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(f"{path}: expected a folder or a .gguf file")
        return HfSource(path, GGUFTensors(path), read_config(path))
    config = path / "config.json"
    if not config.is_file():
        raise FileNotFoundError(f"{config}: missing; expected a Hugging Face checkpoint folder")
    try:
        raw = json.loads(config.read_text())
    except ValueError as error:
        raise ValueError(f"{config}: not valid JSON ({error})") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{config}: expected a JSON object, found a {type(raw).__name__}")
    return HfSource(path, SafetensorsFolder(path), raw)
