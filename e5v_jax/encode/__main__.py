"""``python -m e5v_jax.encode --model DIR --text "a dog" "a cat" --image dog.jpg``."""

import sys
from collections.abc import Sequence

from e5v_jax.exits import guarded


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; ``argv`` are its words, None takes the command line's."""
    with guarded(argv) as words:
        if "--dry-run" in words:
            sys.exit(
                "error: --dry-run is a command of its own: python -m e5v_jax.dryrun encode --help"
            )
        from e5v_jax import cli  # here and below: they take a while, and Ctrl-C may come meanwhile
        from e5v_jax.encode.command import encode
        from e5v_jax.encode.options import Args

        cli.run(encode, Args, argv=words)


if __name__ == "__main__":
    main()
