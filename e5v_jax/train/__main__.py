"""``python -m e5v_jax.train --config FILE [--field value ...] [--dry-run --topology v5e:4x8]``."""

import runpy
import sys
from pathlib import Path

from e5v_jax import cli
from e5v_jax.train.config import TrainConfig
from e5v_jax.train.loop import train


def read_config(file: Path) -> TrainConfig:
    """Run a configuration file and call its ``get_config()``.

    Raises:
        cli.UsageError: no such file, or it does not give a TrainConfig.
    """
    if not file.is_file():
        raise cli.UsageError(f"--config {file}: no such file")
    get_config = runpy.run_path(str(file)).get("get_config")
    config = get_config() if callable(get_config) else None
    if not isinstance(config, TrainConfig):
        raise cli.UsageError(f"--config {file}: expected a get_config() that returns a TrainConfig")
    return config


def main(argv: list[str]) -> None:
    """Split ``--config FILE`` off the command line; all other flags override its fields."""
    default = None
    for i, word in enumerate(argv):
        name, equals, value = word.partition("=")
        if name == "--config":
            with cli.exit_on_error(show_traceback="--traceback" in argv):
                if not equals and i + 1 == len(argv):
                    raise cli.UsageError("--config: expected a file")
                default = read_config(Path(value if equals else argv[i + 1]))
            argv = argv[:i] + argv[i + (1 if equals else 2) :]
            break
    if "--dry-run" in argv:
        # here, not above: training itself needs none of it
        from e5v_jax.dryrun.run import TrainDryRun, as_dry_run, dry_run_train

        argv = [word for word in argv if word != "--dry-run"]
        dry_default = None if default is None else as_dry_run(default)
        cli.run(dry_run_train, TrainDryRun, default=dry_default, argv=argv)
    cli.run(train, TrainConfig, default=default, argv=argv)


if __name__ == "__main__":
    main(sys.argv[1:])
