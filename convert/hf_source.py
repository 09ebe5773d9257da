"""Hugging Face checkpoints as a WeightSource: safetensors folders of any layout, and GGUF files."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes  # ships with jax; gives NumPy its bfloat16
import numpy as np
import safetensors

from convert.gguf import GGUFTensors, read_config
from convert.names import KeyMap, apply, apply_shape, map_keys
from e5v_jax.config import ModelConfig

_DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


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
            ValueError: a damaged shard, a key in no shard, only pickled ``.bin`` weights.
        """
        self.folder = folder
        index = folder / "model.safetensors.index.json"
        weight_map: dict[str, str] | None = None
        if index.is_file():
            weight_map = json.loads(index.read_text())["weight_map"]
            files = sorted(folder / name for name in set(weight_map.values()))
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
        self._dtypes: dict[str, np.dtype[Any]] = {}
        for file in files:
            self._open(file)
        if weight_map is not None:
            for key, name in weight_map.items():
                if key not in self._files:
                    raise ValueError(f"{folder / name}: {key} is in the index but not in the file")

    def _open(self, file: Path) -> None:
        if not file.is_file():
            raise FileNotFoundError(f"{file}: named by model.safetensors.index.json but missing")
        try:
            with safetensors.safe_open(file, framework="numpy") as handle:
                for key in handle.keys():  # noqa: SIM118 (safe_open is no mapping)
                    view = handle.get_slice(key)
                    kind = view.get_dtype()
                    if kind not in _DTYPES:
                        raise ValueError(
                            f"{file}: {key}: dtype {kind}, expected one of {sorted(_DTYPES)}"
                        )
                    self._files[key] = file
                    self._shapes[key] = tuple(view.get_shape())
                    self._dtypes[key] = _DTYPES[kind]
        except safetensors.SafetensorError as error:
            raise ValueError(f"{file}: damaged or truncated ({error}); fetch it again") from error

    def keys(self) -> list[str]:
        """Hugging Face names."""
        return list(self._files)

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of one tensor."""
        return self._shapes[key]

    def dtype(self, key: str) -> np.dtype[Any]:
        """Dtype of one tensor."""
        return self._dtypes[key]

    def read(self, key: str) -> np.ndarray:
        """One tensor; only its bytes are read."""
        with safetensors.safe_open(self._files[key], framework="numpy") as handle:
            return np.asarray(handle.get_tensor(key))


class HfSource:
    """A Hugging Face checkpoint under our names (a :class:`e5v_jax.converted.WeightSource`)."""

    def __init__(self, tensors: TensorReader, raw_config: dict[str, Any]) -> None:
        """Map every key.

        Raises:
            ValueError: an unsupported architecture, or a key that no rule knows.
        """
        self.tensors = tensors
        self.raw_config = raw_config
        self.config = ModelConfig.from_hf(raw_config)
        self.key_map: KeyMap = map_keys(
            tensors.keys(), num_vision_layers=self.config.num_vision_layers
        )
        self._keys = {mapped.ours: key for key, mapped in self.key_map.mapped.items()}
        if len(self._keys) != len(self.key_map.mapped):
            raise ValueError("two keys of the checkpoint feed the same parameter")

    def dtype(self) -> np.dtype[Any]:
        """The narrowest dtype that holds every tensor exactly."""
        kinds = {self.tensors.dtype(key) for key in self.key_map.mapped}
        return kinds.pop() if len(kinds) == 1 else np.dtype(np.float32)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Our parameter names and shapes."""
        return {
            mapped.ours: apply_shape(mapped.transform, self.tensors.shape(key))
            for key, mapped in self.key_map.mapped.items()
        }

    def read(self, names: Sequence[str]) -> Iterator[np.ndarray]:
        """The named parameters in order, in our orientation and the source's dtype."""
        for name in names:
            key = self._keys[name]
            yield apply(self.key_map.mapped[key].transform, self.tensors.read(key))


def resolve(source: str, revision: str | None = None) -> Path:
    """A local folder or GGUF file as it is; else a Hugging Face hub id, fetched.

    Raises:
        FileNotFoundError: neither a local path nor a repository that can be fetched.
    """
    path = Path(source)
    if path.exists():
        return path
    if source.count("/") != 1 or source.startswith((".", "/", "~")):
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
        ValueError: as :class:`HfSource` and :class:`SafetensorsFolder` say.
    """
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(f"{path}: expected a folder or a .gguf file")
        return HfSource(GGUFTensors(path), read_config(path))
    config = path / "config.json"
    if not config.is_file():
        raise FileNotFoundError(f"{config}: missing; expected a Hugging Face checkpoint folder")
    try:
        raw = json.loads(config.read_text())
    except ValueError as error:
        raise ValueError(f"{config}: not valid JSON ({error})") from error
    return HfSource(SafetensorsFolder(path), raw)
