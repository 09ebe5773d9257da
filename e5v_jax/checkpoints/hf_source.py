"""Hugging Face checkpoints as a WeightSource: safetensors folders of any layout, and GGUF files."""

import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from e5v_jax.checkpoints.finite import check_finite
from e5v_jax.checkpoints.gguf import GGUFTensors, read_config
from e5v_jax.checkpoints.json_file import read_json
from e5v_jax.checkpoints.names import map_keys
from e5v_jax.checkpoints.preprocessor import match_preprocessor
from e5v_jax.checkpoints.safetensors_file import SafetensorsFolder
from e5v_jax.families import find_family, with_model_type
from e5v_jax.nn.config import UnsupportedModelError
from e5v_jax.storage import as_path, check_reachable, in_bucket

if TYPE_CHECKING:  # which takes a second
    from transformers import PreTrainedTokenizerFast


class Tensors(Protocol):
    """Arrays under Hugging Face keys, as torch has them, each read when it is asked for."""

    def keys(self) -> list[str]:
        """All keys."""

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of one tensor."""

    def dtype(self, key: str) -> np.dtype[Any]:
        """Dtype of one tensor. Raises ValueError: not a dtype of weights."""

    def read(self, key: str) -> np.ndarray:
        """One tensor. Raises ValueError: the file is damaged."""


class HfSource:
    """A Hugging Face checkpoint under our names (a :class:`WeightSource`)."""

    def __init__(self, path: Path, tensors: Tensors, raw_config: dict[str, Any]) -> None:
        """Map every key of ``path``, and compare every shape with what the configuration asks for.

        Raises:
            UnsupportedModelError: the configuration asks for something not computed here.
            ValueError: an invalid configuration, a key that no row knows or that is one too many,
                a missing key or a wrong shape or dtype, by its name in the checkpoint.
        """
        self.path, self.tensors = path, tensors
        self.raw_config = raw_config = with_model_type(raw_config)
        classes = raw_config.get("architectures")
        self.known_as = (str(path), *(map(str, classes) if isinstance(classes, list) else ()))
        file = path / "config.json" if path.is_dir() else path
        try:
            self.family = find_family(raw_config)
            self.config = self.family.read_config(raw_config)
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"{file}: {error}") from error
        except Exception as error:  # transformers' configuration classes raise many types
            reason = textwrap.shorten(str(error), 200)  # some list every architecture there is
            raise ValueError(f"{file}: not a valid configuration: {reason}") from error
        self.config = match_preprocessor(path, self.family, self.config)
        self.table = self.family.parameters(self.config)
        try:
            self.slots = map_keys(tensors.keys(), self.table)
            for key, slot in self.slots.items():
                tensors.dtype(key)
                found, expected = list(tensors.shape(key)), list(slot.row.hf_shape)
                if found != expected:
                    raise ValueError(f"{key}: shape {found}, the configuration asks for {expected}")
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        self._keys = {slot.name: key for key, slot in self.slots.items() if slot.needed}

    def match_tokenizer(self, tokenizer: "PreTrainedTokenizerFast") -> Any:
        """The configuration as the tokenizer has it. Raises ValueError: they do not fit."""
        try:
            return self.family.match_tokenizer(self.config, tokenizer)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from error

    def dtype(self) -> np.dtype[Any]:
        """The narrowest dtype that holds every tensor exactly."""
        kinds = {self.tensors.dtype(key) for key in self._keys.values()}
        return kinds.pop() if len(kinds) == 1 else np.dtype(np.float32)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Our parameter names and shapes."""
        return {name: self.slots[key].row.shape for name, key in self._keys.items()}

    def read(self, names: Sequence[str]) -> Iterator[np.ndarray]:
        """The named parameters in order, in our orientation; else as :meth:`read_key`."""
        for key in map(self._keys.__getitem__, names):
            yield self.slots[key].row.from_hf(self.read_key(key))

    def read_key(self, key: str) -> np.ndarray:
        """A tensor as it is. Raises ValueError: the file is damaged, a value is NaN or infinite."""
        return check_finite(self.tensors.read(key), f"{self.path}: {key}")


def resolve(source: str, revision: str | None = None) -> Path:
    """A local path as it is, or a hub id, fetched.

    Raises FileNotFoundError: it is neither; OSError: a bucket that cannot be reached.
    """
    check_reachable(source)
    path = as_path(source)
    if path.exists():
        return path
    if source.count("/") != 1 or source.startswith((".", "/", "~", "gs:")):
        raise FileNotFoundError(f"{source}: no such folder or file")
    from huggingface_hub import snapshot_download  # only for hub ids: it is slow to import

    patterns = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=patterns))
    except Exception as error:  # network, authentication and missing repositories: many types
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"{source}: no such folder, and not fetched from the Hugging Face hub: {reason}"
        ) from error


def open_source(path: Path) -> HfSource:
    """Open a Hugging Face folder or a GGUF file.

    Raises FileNotFoundError: no config.json or weights; ValueError: in a bucket, or as
    :class:`HfSource` and :class:`SafetensorsFolder` say.
    """
    if in_bucket(path):
        raise ValueError(
            f"{path}: only a converted folder can be read from a bucket; fetch it, then run "
            "e5v-convert"
        )
    if path.is_file() and path.suffix == ".gguf":
        return HfSource(path, GGUFTensors(path), read_config(path))
    if not path.is_dir():
        raise ValueError(f"{path}: expected a folder or a .gguf file")
    config = path / "config.json"
    if not config.exists():
        raise FileNotFoundError(f"{config}: missing; expected a Hugging Face checkpoint folder")
    raw = read_json(config)  # before the weights: the smaller file says more
    return HfSource(path, SafetensorsFolder(path), raw)
