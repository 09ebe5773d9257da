"""``python -m e5v_jax.demo``: convert a real language model, train on text pairs, compare."""

from collections.abc import Sequence

from e5v_jax.exits import guarded


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; ``argv`` are its words, None takes the command line's."""
    with guarded(argv) as words:
        from e5v_jax import cli  # here and below: they take seconds, and Ctrl-C may come meanwhile
        from e5v_jax.demo.command import Args, demo

        cli.run(demo, Args, argv=words)


if __name__ == "__main__":
    main()
