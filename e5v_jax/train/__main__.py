"""``python -m e5v_jax.train --config FILE [--field value ...]``."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from e5v_jax.exits import guarded

if TYPE_CHECKING:
    from e5v_jax.train.command import TrainCommand


def main(argv: Sequence[str] | None = None) -> None:
    """Train as the configuration file and the flags say; ``argv`` None takes the command line's."""
    with guarded(argv) as words:
        if "--dry-run" in words:
            sys.exit(
                "error: --dry-run is a command of its own: python -m e5v_jax.dryrun train --help"
            )
        import tyro  # here and below: they take seconds, and Ctrl-C may come meanwhile

        from e5v_jax import cli
        from e5v_jax.train.command import TrainCommand
        from e5v_jax.train.config import TrainConfig

        cli.show_log()
        run, words = cli.split_config(words, TrainConfig)
        if run is None:
            run = TrainConfig(model=tyro.MISSING, output=tyro.MISSING)
        cli.run(start, TrainCommand, default=TrainCommand(run), argv=words)


def start(command: "TrainCommand") -> None:
    """Train as the command says; raises as ``train``, and as ``plan_here`` where that is asked."""
    from e5v_jax.train.loop import train

    run = command.run
    if command.plan == "auto":
        from e5v_jax.dryrun.here import plan_here  # which knows training, as a command may, too

        run = plan_here(run)
    train(run)


if __name__ == "__main__":
    main()
