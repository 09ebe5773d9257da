"""Adapters by the folder that a user names: PEFT's, a training run's or a checkpoint's."""

import logging
from pathlib import Path

from e5v_jax.checkpoints.converted import WeightSource
from e5v_jax.checkpoints.peft import Adapter, is_peft, read_adapter
from e5v_jax.train.checkpoint import find_run, read_run_adapter, read_run_info

_logger = logging.getLogger(__name__)


def load_adapter(folder: Path, base: WeightSource) -> Adapter:
    """LoRA factors of a PEFT folder, a run folder or RUN/checkpoints/STEP.

    Of a run folder, those that the finished run left, else those of the newest checkpoint.

    Raises:
        FileNotFoundError: neither.
        ValueError: the adapter does not fit the model.
    """
    run = find_run(folder)
    if run is not None:
        path, step = run
        prompt = read_run_info(path)["config"]["data"]["prompt"]
        if prompt not in ("text", "released"):
            _logger.warning("%s was trained with data.prompt %r: encode with it too", path, prompt)
        if step is None and is_peft(path / "adapter"):
            return read_adapter(path / "adapter", base.table)
        return read_run_adapter(path, step, base)
    if is_peft(folder):
        return read_adapter(folder, base.table)
    raise FileNotFoundError(
        f"{folder}: neither a PEFT adapter (adapter_config.json) nor a run folder (run.json) or "
        "one of its checkpoints"
    )
