"""Hugging Face checkpoints as a WeightSource: safetensors folders of any layout, and GGUF files."""

import json
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from e5v_jax.checkpoints.gguf import GGUFTensors, read_config
from e5v_jax.checkpoints.names import map_keys
from e5v_jax.checkpoints.safetensors_file import SafetensorsFolder
from e5v_jax.families import find_family
from e5v_jax.families.base import Family, ModelConfig
from e5v_jax.nn.config import UnsupportedModelError
from e5v_jax.storage import as_path, check_reachable, in_bucket


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected a JSON object, found a {type(content).__name__}")
    return content


def check_preprocessor(folder: Path, family: Family, config: ModelConfig) -> None:
    """Refuse an image processor in ``folder`` that does something else than is computed here.

    transformers 4 writes its settings to preprocessor_config.json, transformers 5 to the
    ``image_processor`` of processor_config.json, beside the tokenizer's and the processor's own.

    Raises:
        UnsupportedModelError: names file and setting.
        ValueError: a file that is no JSON object.
    """
    for file in (folder / "preprocessor_config.json", folder / "processor_config.json"):
        if file.is_file():
            settings = _read_json(file)
            nested = settings.pop("image_processor", {})
            try:
                family.check_preprocessor(config, {**settings, **nested})
            except UnsupportedModelError as error:
                raise UnsupportedModelError(f"{file}: {error}") from error


class HfSource:
    """A Hugging Face checkpoint under our names (a :class:`WeightSource`)."""

    def __init__(
        self, path: Path, tensors: SafetensorsFolder | GGUFTensors, raw_config: dict[str, Any]
    ) -> None:
        """Map every key of ``path``, and compare every shape with what the configuration asks for.

        Raises:
            UnsupportedModelError: the configuration asks for something not computed here.
            ValueError: an invalid configuration, a key that no row knows or that is one too many,
                a missing key or a wrong shape or dtype, by its name in the checkpoint.
        """
        self.tensors, self.raw_config = tensors, raw_config
        file = path / "config.json" if path.is_dir() else path
        try:
            self.family = find_family(raw_config)
            self.config = self.family.read_config(raw_config)
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"{file}: {error}") from error
        except Exception as error:  # transformers' configuration classes raise many types
            reason = textwrap.shorten(str(error), 200)  # some list every architecture there is
            raise ValueError(f"{file}: not a valid configuration: {reason}") from error
        check_preprocessor(path, self.family, self.config)
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

    def dtype(self) -> np.dtype[Any]:
        """The narrowest dtype that holds every tensor exactly."""
        kinds = {self.tensors.dtype(key) for key in self._keys.values()}
        return kinds.pop() if len(kinds) == 1 else np.dtype(np.float32)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Our parameter names and shapes."""
        return {name: self.slots[key].row.shape for name, key in self._keys.items()}

    def read(self, names: Sequence[str]) -> Iterator[np.ndarray]:
        """The named parameters in order, in our orientation and the source's dtype."""
        for key in map(self._keys.__getitem__, names):
            yield self.slots[key].row.from_hf(self.tensors.read(key))


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
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(f"{path}: expected a folder or a .gguf file")
        return HfSource(path, GGUFTensors(path), read_config(path))
    config = path / "config.json"
    if not config.is_file():
        raise FileNotFoundError(f"{config}: missing; expected a Hugging Face checkpoint folder")
    raw = _read_json(config)  # before the weights: the smaller file says more
    return HfSource(path, SafetensorsFolder(path), raw)
