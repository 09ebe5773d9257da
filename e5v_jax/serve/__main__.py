"""``python -m e5v_jax.serve --model DIR``."""

from collections.abc import Sequence

from e5v_jax.exits import guarded


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; ``argv`` are its words, None takes the command line's."""
    with guarded(argv) as words:
        from e5v_jax import cli  # here and below: they take a while, and Ctrl-C may come meanwhile
        from e5v_jax.serve.command import serve
        from e5v_jax.serve.options import Args

        cli.run(serve, Args, argv=words)


if __name__ == "__main__":
    main()
