"""What a run is: its ``run.json``, and whether another start may go on with it.

RUN/run.json       an id, the resolved configuration, the base model's content hash, the data's
RUN/checkpoints/   :mod:`e5v_jax.train.checkpoint`
RUN/metrics.jsonl  one line every log_every steps
"""

import dataclasses
import json
import logging
import uuid
from pathlib import Path
from typing import Any

from e5v_jax.atomic import new_folder, write_whole
from e5v_jax.checkpoints.adapters import CHECKPOINTS, lora_of, read_run_info
from e5v_jax.distributed import is_first, wait_for_all
from e5v_jax.train.config import RunConfig, TrainConfig

_logger = logging.getLogger(__name__)


def check_run_folder(cfg: RunConfig) -> None:
    """Refuse an output that would be written over. Nothing is created yet.

    Raises FileExistsError: it holds something, ``cfg.resume`` is off; ValueError: it is no run.
    """
    if cfg.output.exists() and any(cfg.output.iterdir()):
        if not cfg.resume:
            raise FileExistsError(
                f"{cfg.output}: already exists; pass --resume to continue it, or choose another"
            )
        if not (cfg.output / "run.json").is_file():
            raise ValueError(f"{cfg.output}: cannot resume, there is no run.json in it")


def run_info(cfg: RunConfig, base_hash: str, fingerprint: str) -> dict[str, Any]:
    """Make the contents of ``run.json``, of JSON's types; ``fingerprint`` is that of the data."""
    config = dataclasses.asdict(cfg)
    info = {"config": config, "base_hash": base_hash, "data_fingerprint": fingerprint}
    if cfg.command != TrainConfig.command:  # which was the only one when it was not said
        info["command"] = cfg.command
    plain: dict[str, Any] = json.loads(json.dumps(info, default=str))
    return plain


def check_same_run(
    run: Path,
    info: dict[str, Any],
    *,
    allowed: tuple[str, ...] = (),
    config_type: type[RunConfig] = TrainConfig,
) -> None:
    """Refuse to resume with what makes the saved state mean something else; a new run passes.

    Raises ValueError: a run of another command than that of ``config_type``; a field that differs,
    but for those that are ``allowed`` to; one of these that is none; or a malformed run.json.
    """
    if not (run / "run.json").is_file():
        return
    saved = read_run_info(run)
    if (command := saved.get("command", TrainConfig.command)) != config_type.command:
        raise ValueError(
            f"{run}: cannot resume: it is a run of {command}, not of {config_type.command}; "
            "choose another output"
        )
    before, now = (_identity(run, x, config_type) for x in (saved, info))
    for name in allowed:
        if name not in now or name == "lora":  # the saved arrays would not fit
            fields = ", ".join(x for x in now if x != "lora")
            raise ValueError(f"--allow-change {name}: expected one of {fields}")
    for name, value in now.items():
        if value != before[name] and name not in allowed:
            raise ValueError(
                f"{run}: cannot resume: {name} was {before[name]} and is now {value}; "
                "go back to that, or choose another output"
                + ("" if name == "lora" else f", or accept it with --allow-change {name}")
            )


_SINGLE = ("batch_size", "num_epochs", "max_steps", "seed", "dtype", "quantize", "train")
# which rows there are is the fingerprint's to tell
_FREE = ("data.path", "data.tfds", "data.tfds_dir", "data.length_groups")


def _identity(run: Path, info: dict[str, Any], kind: type[RunConfig]) -> dict[str, Any]:
    """Tell what must stay the same; a field that came after the run had its default then."""
    default = run_info(kind(model=Path(), output=Path()), "", "")["config"]
    config = default | info["config"]
    lora = lora_of(run, config)  # if it is there and has fewer fields, LoRAConfig's are the others
    hashes = ("base_hash", "data_fingerprint")
    groups = [name for name in ("data", "loss", "optimizer") if default[name] is not None]
    right = [isinstance(info.get(name), str) for name in hashes]
    right += [isinstance(config[group], dict) for group in groups]
    if not all(right):
        raise ValueError(
            f"{run / 'run.json'}: expected base_hash, data_fingerprint and, in config, the objects "
            f"{', '.join(groups)}; restore it from a copy"
        )
    filled = {group: default[group] | config[group] for group in groups}
    fields = {f"{group}.{name}": x for group in groups for name, x in filled[group].items()}
    return {
        **{name: info[name] for name in hashes},
        "lora": None if lora is None else dataclasses.asdict(lora),
        **{name: config[name] for name in _SINGLE if name in default},
        **{name: value for name, value in fields.items() if name not in _FREE},
    }


def tell_lost_checkpoints(run: Path) -> None:
    """Warn that a resumed run begins again, as it has no checkpoint to go on from."""
    file = run / "metrics.jsonl"
    if is_first() and file.is_file() and (lines := file.read_bytes().splitlines()):
        _logger.warning(
            "%s: there is no checkpoint, so the run begins again at step 0 though %s has %d lines; "
            "if there were any, stop it and bring them back",
            *(run / CHECKPOINTS, file.name, len(lines)),
        )


def write_run_info(run: Path, info: dict[str, Any]) -> None:
    """Create the run folder with its ``run.json``, or renew all but the id in a resumed run's."""
    if is_first():
        resumed = (run / "run.json").is_file()
        # before there were ids, wandb knew a run by its name
        run_id = read_run_info(run).get("id", run.name) if resumed else uuid.uuid4().hex
        text = json.dumps({"id": run_id, **info}, indent=1) + "\n"
        if resumed:
            write_whole(run / "run.json", lambda file: file.write(text.encode()))
        else:
            with new_folder(run) as folder:  # so that a run folder always has its run.json
                (folder / "run.json").write_text(text)
    wait_for_all("run.json")
