"""What a finished run leaves for others: a PEFT adapter, or a whole model as converted folder."""

from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from e5v_jax.atomic import new_folder
from e5v_jax.checkpoints.converted import ConvertedFolder, write_again
from e5v_jax.checkpoints.loading import dotted
from e5v_jax.checkpoints.peft import Adapter, read_merged, write_adapter
from e5v_jax.checkpoints.trained_with import TrainedWith, resolve_names
from e5v_jax.distributed import is_first
from e5v_jax.nn.layers import LoRAConfig
from e5v_jax.storage import remove_folder
from e5v_jax.train.step import all_finite


def export(run: Path, lora: LoRAConfig | None, weights: nnx.State, base: ConvertedFolder) -> None:
    """Write RUN/adapter as a PEFT folder, or without ``lora`` RUN/model; replace earlier ones.

    Raises ValueError: a weight is not finite; names it.
    """
    if lora is None:
        export_model(run, None, weights, base)
        return
    if (values := _gather(run, weights)) is None:
        return

    def write(folder: Path) -> None:
        write_adapter(folder, _adapter(lora, values), base.table, base_model=base.info.source)
        resolve_names(TrainedWith.of_run(run), base).write(folder)

    _replace(run / "adapter", write)


def export_model(
    run: Path, lora: LoRAConfig | None, weights: nnx.State, base: ConvertedFolder
) -> None:
    """Write RUN/model, a converted folder: ``weights`` in place of the base's, ``lora`` merged.

    All are rounded to the base's dtype. Raises ValueError: a weight is not finite; names it.
    """
    if (values := _gather(run, weights)) is not None:
        adapter = None if lora is None else _adapter(lora, values)
        _replace(run / "model", lambda folder: _write_model(folder, values, adapter, base))


def _gather(run: Path, weights: nnx.State) -> Mapping[str, jax.Array | np.ndarray] | None:
    """The trained arrays by their path; None where another process writes them."""
    trained = {dotted(path): x[...] for path, x in nnx.to_flat_state(weights)}
    for name, array in trained.items():
        if not all_finite(array):
            raise ValueError(f"{run}: {name} is not finite after training: nothing is exported")
    if jax.process_count() > 1:  # to the host of every process; else they go layer by layer
        trained = multihost_utils.process_allgather(trained, tiled=True)
    return trained if is_first() else None


def _adapter(lora: LoRAConfig, trained: Mapping[str, jax.Array | np.ndarray]) -> Adapter:
    factors = (name for name in trained if name.endswith((".lora_a", ".lora_b")))
    return Adapter(lora, {name: np.asarray(trained[name]) for name in factors})


def _replace(dst: Path, write: Callable[[Path], None]) -> None:
    remove_folder(dst)
    with new_folder(dst) as folder:
        write(folder)
    print(f"{dst}: written")


def _write_model(
    folder: Path,
    trained: Mapping[str, jax.Array | np.ndarray],
    adapter: Adapter | None,
    base: ConvertedFolder,
) -> None:
    dtype = np.dtype(base.info.dtype)

    def array(name: str) -> np.ndarray:
        """Take what was trained from the run, everything else from the base."""
        slot = base.table.stored[name]
        if slot.row.path not in trained:
            ((_, merged),) = read_merged(base, [name], adapter, dtype)
            return merged
        weight = trained[slot.row.path]
        weight = weight if slot.layer is None else weight[slot.layer]
        return np.asarray(weight.astype(dtype))

    arrays = ({name: array(name) for name in layer} for layer in base.table.groups(base.shapes()))
    write_again(folder, base, arrays)
