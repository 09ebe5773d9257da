"""``python -m e5v_jax.train --config FILE [--field value ...]``."""

import sys
from collections.abc import Sequence

from e5v_jax.exits import guarded


def main(argv: Sequence[str] | None = None) -> None:
    """Train as the configuration file and the flags say; ``argv`` None takes the command line's."""
    with guarded(argv) as words:
        if "--dry-run" in words:
            sys.exit(
                "error: --dry-run is a command of its own: python -m e5v_jax.dryrun train --help"
            )
        from e5v_jax import cli  # here and below: they take seconds, and Ctrl-C may come meanwhile
        from e5v_jax.train.config import TrainConfig
        from e5v_jax.train.loop import train

        cli.show_log()
        default, words = cli.split_config(words, TrainConfig)
        cli.run(train, TrainConfig, default=default, argv=words)


if __name__ == "__main__":
    main()
