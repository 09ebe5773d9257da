"""``python -m e5v_jax.align --config FILE [--field value ...]``."""

from collections.abc import Sequence

from e5v_jax.exits import guarded


def main(argv: Sequence[str] | None = None) -> None:
    """Align as the configuration file and the flags say; ``argv`` None takes the command line's."""
    with guarded(argv) as words:
        from e5v_jax import cli  # here and below: they take seconds, and Ctrl-C may come meanwhile
        from e5v_jax.align.config import AlignConfig
        from e5v_jax.align.task import align

        cli.show_log()
        default, words = cli.split_config(words, AlignConfig)
        cli.run(align, AlignConfig, default=default, argv=words)


if __name__ == "__main__":
    main()
