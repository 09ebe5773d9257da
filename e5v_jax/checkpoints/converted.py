"""The converted folder: what ``e5v-convert`` writes and every other command reads.

    config.json          format version, model config, source, dtype, content hash
    hf_config.json       the source's config.json, for export
    tokenizer and preprocessor files, as Hugging Face wrote them
    params/              Orbax; one leaf per parameter and layer: language_model.layers.17.mlp...
    unused.safetensors   tensors an embedding never needs (lm_head, ...), kept for export under the
                         keys that it will write
    adapter/             a PEFT LoRA adapter carried along, if any

Layers are stored one by one, so a model converts in the memory of one layer whatever its depth.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from orbax.checkpoint import v1 as ocp

from e5v_jax.families import FAMILIES
from e5v_jax.families.base import Family, ModelConfig
from e5v_jax.nn.parameters import ParameterTable
from e5v_jax.storage import absolute, as_path

FORMAT_VERSION = 2


class WeightSource(Protocol):
    """Anything that yields parameters by name, one layer at a time."""

    family: Family
    config: ModelConfig
    table: ParameterTable

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every parameter's name (layers unstacked) and shape in our layout."""

    def read(self, names: Sequence[str]) -> Iterator[np.ndarray]:
        """The named arrays in order, in the dtype they are stored in."""


@dataclass(frozen=True)
class ConvertedInfo:
    """The contents of ``config.json``."""

    format_version: int
    model_type: str  # key of the family in families.FAMILIES
    model: dict[str, Any]  # its configuration, as dataclasses.asdict has it
    source: str
    revision: str | None
    dtype: str
    content_hash: str
    parameters: dict[str, list[int]]  # name -> shape


def write_params(
    folder: Path, groups: Iterable[dict[str, np.ndarray]]
) -> tuple[str, dict[str, list[int]]]:
    """Write groups of named arrays under ``folder/params``; one group is in memory at a time.

    Returns the content hash (sha256 over names, dtypes, shapes and bytes) and all shapes.
    """
    digest = hashlib.sha256()
    shapes: dict[str, list[int]] = {}
    path = folder / "params"
    context = ocp.Context()
    # Weights do not compress, and chunks bound the writer's copies: a 1 GB array takes 0.7 s and
    # one copy instead of 8 s and two.
    context.array.saving.use_compression = False
    context.array.saving.storage_options.chunk_byte_size = 64 * 2**20
    with context:
        for group in groups:
            for name, array in group.items():
                digest.update(f"{name} {array.dtype} {array.shape}".encode())
                digest.update(np.ascontiguousarray(array).view(np.uint8).data)
                shapes[name] = list(array.shape)
            ocp.partial.save(path, unflatten_dict(group, sep="."))
        ocp.partial.finalize(path)
    return digest.hexdigest(), shapes


def write_info(folder: Path, info: ConvertedInfo) -> None:
    """Write ``config.json``."""
    (folder / "config.json").write_text(json.dumps(asdict(info), indent=1) + "\n")


def is_converted(folder: Path) -> bool:
    """Whether ``folder`` is a converted folder (its config.json has a format_version)."""
    try:
        return "format_version" in json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return False


def read_info(folder: Path) -> ConvertedInfo:
    """Read ``config.json``.

    Raises:
        FileNotFoundError: there is nothing.
        ValueError: not a converted folder, or written by a newer version.
    """
    if not folder.exists():
        raise FileNotFoundError(
            f"{folder}: no such folder; to make it: e5v-convert SOURCE {folder}"
        )
    if not is_converted(folder):
        raise ValueError(
            f"{folder}: not a converted folder (no format_version in config.json); "
            f"run: e5v-convert {folder} NEW_FOLDER"
        )
    data = json.loads((folder / "config.json").read_text())
    if data["format_version"] == 1:
        # which knew one family, and text-only models as that family without its tower
        model_type = json.loads((folder / "hf_config.json").read_text())["model_type"]
        data |= {"format_version": FORMAT_VERSION, "model_type": model_type}
        if data["model"]["vision"] is None:
            data["model"] = {"text": data["model"]["text"]}
    if data["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"{folder}/config.json: format_version {data['format_version']}, this version reads "
            f"1 and {FORMAT_VERSION}; convert the model again"
        )
    return ConvertedInfo(**data)


class ConvertedFolder:
    """A converted folder as a :class:`WeightSource`."""

    def __init__(self, folder: Path) -> None:
        """Read ``config.json``, parameters on demand. Raises ValueError: not a converted folder."""
        self.folder = as_path(folder)
        self.info = read_info(self.folder)
        self.family = FAMILIES[self.info.model_type]
        self.config = self.family.config_from_dict(self.info.model)
        self.table = self.family.parameters(self.config)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every parameter's name and shape."""
        return {name: tuple(shape) for name, shape in self.info.parameters.items()}

    def read(self, names: Sequence[str]) -> Iterator[np.ndarray]:
        """The named arrays in order. Raises ValueError: the ``params`` are missing or damaged."""
        shapes, dtype = self.info.parameters, np.dtype(self.info.dtype)
        context = ocp.Context()
        context.pytree.loading.partial_load = True
        like = unflatten_dict({name: np.empty(shapes[name], dtype) for name in names}, sep=".")
        try:
            with context:
                tree = ocp.load(absolute(self.folder) / "params", like)
        except Exception as error:  # Orbax and TensorStore raise many types for a damaged file
            raise ValueError(
                f"{self.folder}/params: cannot read {names[0]!r}: {str(error).splitlines()[0]}; "
                "convert the model again"
            ) from error
        arrays = flatten_dict(tree, sep=".")
        yield from (np.asarray(arrays[name]) for name in names)
