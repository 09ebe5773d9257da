"""``python -m convert.from_hf SRC DST``: any Hugging Face layout -> a converted folder."""

from e5v_jax.checkpoints.commands import convert

if __name__ == "__main__":
    convert()
