"""``python -m e5v_jax.train --config FILE [--field value ...]``."""

import sys
from collections.abc import Sequence

from e5v_jax import cli
from e5v_jax.train.config import TrainConfig
from e5v_jax.train.loop import train


def main(argv: Sequence[str] | None = None) -> None:
    """Train as the configuration file and the flags say; ``argv`` None takes the command line's."""
    if "--dry-run" in (argv or sys.argv):
        sys.exit("error: --dry-run is a command of its own: python -m e5v_jax.dryrun train --help")
    cli.show_log()
    default, argv = cli.split_config(sys.argv[1:] if argv is None else argv, TrainConfig)
    cli.run(train, TrainConfig, default=default, argv=argv)


if __name__ == "__main__":
    main()
