"""``python -m e5v_jax.train --config FILE [--field value ...] [--dry-run --topology v5e:4x8]``."""

import sys

from e5v_jax import cli
from e5v_jax.train.config import TrainConfig
from e5v_jax.train.loop import train


def main(argv: list[str]) -> None:
    """Train, or with --dry-run say what the step would need."""
    cli.show_log()
    default, argv = cli.split_config(argv, TrainConfig)
    if "--dry-run" in argv:
        # here, not above: training itself needs none of it
        from e5v_jax.dryrun.run import TrainDryRun, as_dry_run, dry_run_train

        argv = [word for word in argv if word != "--dry-run"]
        dry_default = None if default is None else as_dry_run(default)
        cli.run(dry_run_train, TrainDryRun, default=dry_default, argv=argv)
    cli.run(train, TrainConfig, default=default, argv=argv)


if __name__ == "__main__":
    main(sys.argv[1:])
