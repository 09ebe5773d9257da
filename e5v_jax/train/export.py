"""What a finished run leaves for others: a PEFT adapter, or a whole model as converted folder."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from e5v_jax.atomic import new_folder
from e5v_jax.checkpoints.converted import ConvertedFolder, write_info, write_params
from e5v_jax.checkpoints.loading import dotted
from e5v_jax.checkpoints.peft import Adapter, write_adapter
from e5v_jax.distributed import is_first
from e5v_jax.nn.layers import LoRAConfig
from e5v_jax.storage import copy_file, remove_folder


def export_adapter(dst: Path, lora: LoRAConfig, factors: nnx.State, base: ConvertedFolder) -> None:
    """Write the LoRA factors as a PEFT folder; an earlier one is replaced."""
    values = {dotted(path): _whole(x[...]) for path, x in nnx.to_flat_state(factors)}
    if not is_first():
        return
    remove_folder(dst)
    with new_folder(dst) as folder:
        write_adapter(folder, Adapter(lora, values), base.table, base_model=base.info.source)


def export_model(dst: Path, weights: nnx.State, base: ConvertedFolder) -> None:
    """Write fully trained decoder weights as a converted folder; an earlier one is replaced.

    Vision tower, projector and tokenizer are the base's; weights are rounded to its dtype.
    """
    trained = {dotted(path): x[...] for path, x in nnx.to_flat_state(weights)}
    if jax.process_count() > 1:
        trained = {name: _whole(x) for name, x in trained.items()}
    if not is_first():
        return

    def array(name: str) -> np.ndarray:
        """Take what was trained from the run, everything else from the base."""
        slot = base.table.stored[name]
        if slot.row.path not in trained:
            return next(base.read([name]))
        weight = trained[slot.row.path]
        weight = weight if slot.layer is None else weight[slot.layer]
        return np.asarray(weight.astype(np.dtype(base.info.dtype)))

    remove_folder(dst)
    with new_folder(dst) as folder:
        layers = base.table.groups(base.shapes())
        arrays = ({name: array(name) for name in layer} for layer in layers)
        digest, shapes = write_params(folder, arrays)
        for file in base.folder.iterdir():
            if file.is_file() and file.name != "config.json":
                copy_file(file, folder / file.name)
        write_info(folder, dataclasses.replace(base.info, content_hash=digest, parameters=shapes))


def _whole(array: jax.Array) -> np.ndarray:
    """Bring a sharded array to the host of every process."""
    if array.is_fully_addressable:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
