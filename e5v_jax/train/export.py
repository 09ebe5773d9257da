"""What a finished run leaves for others: a PEFT adapter, or a whole model as converted folder."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from convert.peft import Adapter, write_adapter
from e5v_jax.converted import ConvertedFolder, new_folder, write_info, write_params
from e5v_jax.distributed import is_first
from e5v_jax.loading import dotted, layer_names
from e5v_jax.model.layers import LoRAConfig
from e5v_jax.storage import copy_file, remove_folder


def export_adapter(dst: Path, lora: LoRAConfig, factors: nnx.State, base: ConvertedFolder) -> None:
    """Write the LoRA factors as a PEFT folder; an earlier one is replaced."""
    values = {dotted(path): _whole(x[...]) for path, x in nnx.to_flat_state(factors)}
    if not is_first():
        return
    remove_folder(dst)
    with new_folder(dst) as folder:
        write_adapter(
            folder,
            Adapter(lora, values),
            text_only=base.config.vision is None,
            base_model=base.info.source,
        )


def export_model(dst: Path, weights: nnx.State, base: ConvertedFolder) -> None:
    """Write fully trained decoder weights as a converted folder; an earlier one is replaced.

    Vision tower, projector and tokenizer are the base's; weights are rounded to its dtype.
    """
    trained = {dotted(path): x[...] for path, x in nnx.to_flat_state(weights)}
    if jax.process_count() > 1:
        trained = {name: _whole(x) for name, x in trained.items()}
    if not is_first():
        return
    remove_folder(dst)
    with new_folder(dst) as folder:
        digest, shapes = write_params(folder, _groups(trained, base))
        for file in base.folder.iterdir():
            if file.is_file() and file.name != "config.json":
                copy_file(file, folder / file.name)
        write_info(folder, dataclasses.replace(base.info, content_hash=digest, parameters=shapes))


def _whole(array: jax.Array) -> np.ndarray:
    """A sharded array on the host of every process."""
    if array.is_fully_addressable:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def _groups(
    trained: Mapping[str, jax.Array | np.ndarray], base: ConvertedFolder
) -> Iterator[dict[str, np.ndarray]]:
    """Decoder layer by layer from the run, everything else from the base."""
    dtype = np.dtype(base.info.dtype)
    stacked = {path: array for path, array in trained.items() if ".layers." in path}
    yield {p: np.asarray(x.astype(dtype)) for p, x in trained.items() if p not in stacked}
    names = {path: layer_names(path, array.shape) for path, array in stacked.items()}
    for i in range(base.config.text.num_hidden_layers):
        yield {names[path][i]: np.asarray(x[i].astype(dtype)) for path, x in stacked.items()}
    for name in base.shapes():
        if not name.startswith("language_model."):
            yield {name: next(base.read([name]))}
