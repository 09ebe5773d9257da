"""``e5v-convert``, ``e5v-compose`` and ``e5v-export``, guarded from their first import on.

Each takes the words of its command line as ``argv``; None takes those of this process.
"""

from collections.abc import Sequence

from e5v_jax.exits import guarded


def convert(argv: Sequence[str] | None = None) -> None:
    """Run ``e5v-convert SRC DST``: any Hugging Face layout -> a converted folder."""
    with guarded(argv) as words:
        from e5v_jax import cli  # here and below: they take seconds, and Ctrl-C may come meanwhile
        from e5v_jax.checkpoints import from_hf

        cli.run(from_hf.convert, from_hf.Args, argv=words)


def export(argv: Sequence[str] | None = None) -> None:
    """Run ``e5v-export SRC DST``: a converted folder -> Hugging Face or PEFT folder."""
    with guarded(argv) as words:
        from e5v_jax import cli
        from e5v_jax.checkpoints import to_hf

        cli.run(to_hf.convert, to_hf.Args, argv=words)


def compose(argv: Sequence[str] | None = None) -> None:
    """Run ``e5v-compose LLM TOWER DST``: a decoder and a vision tower -> a converted folder."""
    with guarded(argv) as words:
        from e5v_jax import cli
        from e5v_jax.checkpoints import compose

        cli.run(compose.compose, compose.Args, argv=words)
