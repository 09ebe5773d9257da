"""What a finished run leaves for others: a PEFT adapter, or a whole model as converted folder."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from e5v_jax.atomic import new_folder
from e5v_jax.checkpoints.converted import ConvertedFolder, write_info, write_params
from e5v_jax.checkpoints.loading import dotted
from e5v_jax.checkpoints.peft import Adapter, write_adapter
from e5v_jax.checkpoints.trained_with import TrainedWith, resolve_names
from e5v_jax.checksums import CHECKSUMS, write_checksums
from e5v_jax.distributed import is_first
from e5v_jax.nn.layers import LoRAConfig
from e5v_jax.storage import copy_file, remove_folder
from e5v_jax.train.step import all_finite


def export(run: Path, lora: LoRAConfig | None, weights: nnx.State, base: ConvertedFolder) -> None:
    """Write RUN/adapter as a PEFT folder, or without ``lora`` RUN/model; replace earlier ones.

    The model's decoder weights are rounded to the base's dtype; the rest of it is the base's.

    Raises ValueError: a weight is not finite; names it.
    """
    trained = {dotted(path): x[...] for path, x in nnx.to_flat_state(weights)}
    for name, array in trained.items():
        if not all_finite(array):
            raise ValueError(f"{run}: {name} is not finite after training: nothing is exported")
    if jax.process_count() > 1:  # to the host of every process; else they go layer by layer
        trained = multihost_utils.process_allgather(trained, tiled=True)
    if not is_first():
        return
    dst = run / ("model" if lora is None else "adapter")
    remove_folder(dst)
    with new_folder(dst) as folder:
        if lora is None:
            _write_model(folder, trained, base)
        else:
            adapter = Adapter(lora, {name: np.asarray(array) for name, array in trained.items()})
            write_adapter(folder, adapter, base.table, base_model=base.info.source)
            resolve_names(TrainedWith.of_run(run), base).write(folder)
    print(f"{dst}: written")


def _write_model(
    folder: Path, trained: Mapping[str, jax.Array | np.ndarray], base: ConvertedFolder
) -> None:
    def array(name: str) -> np.ndarray:
        """Take what was trained from the run, everything else from the base."""
        slot = base.table.stored[name]
        if slot.row.path not in trained:
            return next(base.read([name]))
        weight = trained[slot.row.path]
        weight = weight if slot.layer is None else weight[slot.layer]
        return np.asarray(weight.astype(np.dtype(base.info.dtype)))

    arrays = ({name: array(name) for name in layer} for layer in base.table.groups(base.shapes()))
    digest, shapes = write_params(folder, arrays)
    for file in base.folder.iterdir():
        if file.is_file() and file.name not in ("config.json", CHECKSUMS):
            copy_file(file, folder / file.name)
    write_info(folder, dataclasses.replace(base.info, content_hash=digest, parameters=shapes))
    write_checksums(folder)
