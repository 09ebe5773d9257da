"""The converted folder: what ``e5v-convert`` writes and every other command reads.

    config.json          format version, model config, source, dtype, content hash, preset
    hf_config.json       the source's config.json, for export
    tokenizer and preprocessor files, as Hugging Face wrote them
    params/              Orbax; one leaf per parameter and layer: language_model.layers.17.mlp...
    unused.safetensors   tensors an embedding never needs (lm_head, ...), kept for export under the
                         keys that it will write
    adapter/             a PEFT LoRA adapter carried along, if any

Layers are stored one by one, so a model converts in the memory of one layer whatever its depth.
"""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, get_origin

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from e5v_jax.checkpoints.finite import check_finite
from e5v_jax.checkpoints.json_file import read_json
from e5v_jax.checkpoints.preprocessor import check_preprocessor
from e5v_jax.checkpoints.safetensors_file import DTYPES
from e5v_jax.checksums import CHECKSUMS, DamagedFileError, verify_checksums, write_checksums
from e5v_jax.families import FAMILIES
from e5v_jax.families.base import Family, ModelConfig
from e5v_jax.nn.config import from_fields
from e5v_jax.nn.parameters import ParameterTable
from e5v_jax.presets import check_preset
from e5v_jax.storage import as_path, copy_file, in_bucket, without_wildcards

FORMAT_VERSION = 2
_AGAIN = "convert the model again"
_PASSING = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "ABORTED", "UNKNOWN")


class WeightSource(Protocol):
    """Anything that yields parameters by name, one layer at a time."""

    family: Family
    config: ModelConfig
    table: ParameterTable
    known_as: tuple[str, ...]
    """What may tell its preset: names, paths and a class, the surest first."""

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
    preset: str | None = None  # how its authors call it; folders of before had none


def write_params(
    folder: Path, groups: Iterable[dict[str, np.ndarray]]
) -> tuple[str, dict[str, list[int]]]:
    """Write groups of named arrays under ``folder/params``; one group is in memory at a time.

    Returns the content hash (sha256 over names, dtypes, shapes and bytes) and all shapes.
    """
    from orbax.checkpoint import v1 as ocp  # takes 0.3 s, which some need not wait for

    digest = hashlib.sha256()
    shapes: dict[str, list[int]] = {}
    context = ocp.Context()
    # Weights do not compress, and chunks bound the writer's copies: a 1 GB array takes 0.7 s and
    # one copy instead of 8 s and two.
    context.array.saving.use_compression = False
    context.array.saving.storage_options.chunk_byte_size = 64 * 2**20
    with context, without_wildcards(folder) as base:
        path = base / "params"
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
        return "format_version" in read_json(folder / "config.json")
    except (OSError, ValueError):
        return False


def read_info(folder: Path) -> ConvertedInfo:
    """Read ``config.json``.

    Raises:
        FileNotFoundError: there is nothing.
        ValueError: not a converted folder, written by a newer version, or a field is missing, not
            known or of another type.
    """
    if not folder.exists():
        raise FileNotFoundError(
            f"{folder}: no such folder; to make it: e5v-convert SOURCE {folder}"
        )
    if not folder.is_dir():
        raise ValueError(f"{folder}: expected a folder that e5v-convert has made")
    file = folder / "config.json"
    data = read_json(file, todo=_AGAIN)
    if "format_version" not in data:
        raise ValueError(
            f"{folder}: not a converted folder (no format_version in config.json); "
            f"run: e5v-convert {folder} NEW_FOLDER"
        )
    if data["format_version"] == 1 and isinstance(model := data.get("model"), dict):
        # which knew one family, and text-only models as that family without its tower
        model_type = read_json(folder / "hf_config.json", todo=_AGAIN).get("model_type")
        data |= {"format_version": FORMAT_VERSION, "model_type": model_type}
        if model.get("vision") is None:
            data["model"] = {"text": model.get("text")}
    if data["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"{file}: format_version {data['format_version']!r}, this version reads 1 and "
            f"{FORMAT_VERSION}; {_AGAIN}"
        )
    try:
        info = from_fields(ConvertedInfo, data, "it")
        for field in dataclasses.fields(info):
            kind: Any = dict if get_origin(field.type) is dict else field.type
            if not isinstance(getattr(info, field.name), kind):
                raise ValueError(f"{field.name} is {getattr(info, field.name)!r}")
        if info.model_type not in FAMILIES:
            raise ValueError(f"model_type is {info.model_type!r}, not one of {', '.join(FAMILIES)}")
        if info.dtype not in (known := [dtype.name for dtype in DTYPES.values()]):
            raise ValueError(f"dtype is {info.dtype!r}, not one of {', '.join(known)}")
        if info.preset is not None:
            check_preset(info.preset)
    except ValueError as error:
        raise ValueError(f"{file}: {error}; {_AGAIN}") from error
    return info


class ConvertedFolder:
    """A converted folder as a :class:`WeightSource`."""

    def __init__(
        self, folder: Path, *, any_preprocessor: bool = False, verify: bool = False
    ) -> None:
        """Read ``config.json``; parameters are read on demand.

        ``verify`` compares every file with its checksum first, which reads all of them.
        ``any_preprocessor`` takes a folder whose image processor does something else than is
        computed here: so it may be exported, but neither encode nor train.

        Raises ValueError: not a converted folder, a field of it that cannot be, a file that is not
        what was written, or as :func:`check_preprocessor`.
        """
        self.folder = as_path(folder)
        self.info = read_info(self.folder)
        self.known_as: tuple[str, ...] = (
            self.info.preset or "",
            self.info.source,
            str(self.folder),
        )
        if verify:
            _verify(self.folder)
        self.family = FAMILIES[self.info.model_type]
        try:
            self.config = self.family.config_from_dict(self.info.model)
            self.table = self.family.parameters(self.config)
            _check_parameters(self.info.parameters, self.table)
        except ValueError as error:
            raise ValueError(f"{self.folder}/config.json: {error}; {_AGAIN}") from error
        if not any_preprocessor:
            check_preprocessor(self.folder, self.family, self.config)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every parameter's name and shape."""
        return {name: tuple(shape) for name, shape in self.info.parameters.items()}

    def read(self, names: Sequence[str]) -> Iterator[np.ndarray]:
        """The named arrays in order.

        Raises ValueError: the ``params`` are missing or damaged, or a value is NaN or infinite;
        OSError: they cannot be read.
        """
        from orbax.checkpoint import v1 as ocp  # takes 0.3 s, which some need not wait for

        shapes, dtype = self.info.parameters, np.dtype(self.info.dtype)
        context = ocp.Context()
        context.pytree.loading.partial_load = True
        like = unflatten_dict({name: np.empty(shapes[name], dtype) for name in names}, sep=".")
        try:
            with context, without_wildcards(self.folder) as base:
                tree = ocp.load(base / "params", like)
        except Exception as error:  # Orbax and TensorStore raise many types for a damaged file
            raise _unreadable(self.folder / "params", names[0], error) from error
        arrays = flatten_dict(tree, sep=".")
        for name in names:
            yield check_finite(np.asarray(arrays[name]), f"{self.folder}/params: {name}")


def write_again(
    folder: Path,
    base: ConvertedFolder,
    groups: Iterable[dict[str, np.ndarray]],
) -> None:
    """Write ``base`` to an empty ``folder`` with other values, as :func:`write_params` takes them.

    Its other files are copied; its folders, as of an adapter, are not.
    """
    digest, shapes = write_params(folder, groups)
    for file in base.folder.iterdir():
        if file.is_file() and file.name not in ("config.json", CHECKSUMS):
            copy_file(file, folder / file.name)
    write_info(folder, dataclasses.replace(base.info, content_hash=digest, parameters=shapes))
    write_checksums(folder)


def _verify(folder: Path) -> None:
    try:
        has_sums = verify_checksums(folder)
    except DamagedFileError as error:
        raise ValueError(f"{error}; copy it again, or {_AGAIN}") from error
    if not has_sums:
        reason = f"no {CHECKSUMS} to verify it by: an earlier version made it"
        raise ValueError(f"{folder}: {reason}; {_AGAIN}")


def _check_parameters(shapes: dict[str, Any], table: ParameterTable) -> None:
    expected = {name: list(slot.row.shape) for name, slot in table.stored.items()}
    for name in sorted(shapes.keys() | expected.keys()):
        if (found := shapes.get(name)) != expected.get(name):
            raise ValueError(f"parameters: {name} is {found}, expected {expected.get(name)}")


def _unreadable(params: Path, name: str, error: Exception) -> Exception:
    """What the user should read of an error of Orbax or TensorStore, and what to do."""
    if not params.is_dir():
        return FileNotFoundError(f"{params}: missing; {_AGAIN}, or copy it there")
    reason = str(error).splitlines()[0].split(" [tensorstore_spec")[0]
    if found := re.search(r'"([^"/]+)/(?:c/|zarr)', reason):  # of the names that were asked for
        name = found[1]
    status, detail = reason.partition(":")[0], reason.rpartition('": ')[2]
    closed = not in_bucket(params) and not os.access(params / "state", os.R_OK | os.X_OK)
    closed = closed and (params / "state").exists()
    if isinstance(error, PermissionError) or status == "PERMISSION_DENIED" or closed:
        return PermissionError(f"{params}: cannot read {name}: no permission; ask its owner")
    if isinstance(error, OSError) or status in _PASSING:
        return OSError(f"{params}: cannot read {name}: {detail}; try again, or copy the folder")
    if "Orbax" in reason or "AUTO resolution" in reason:
        detail = "a file that says what is there is missing"
    return ValueError(f"{params}: cannot read {name}: damaged ({detail}); {_AGAIN}")
