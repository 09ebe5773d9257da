"""``python -m e5v_jax.search index|query|serve``."""

from collections.abc import Sequence

from e5v_jax.exits import guarded


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; ``argv`` are its words, None takes the command line's."""
    with guarded(argv) as words:
        from e5v_jax.search.command import run  # here: it takes a while, and Ctrl-C may come

        run(words)


if __name__ == "__main__":
    main()
