"""``python -m convert.from_hf SRC DST``: any Hugging Face layout -> a converted folder."""

from e5v_jax.checkpoints.from_hf import Args, convert, main

__all__ = ["Args", "convert", "main"]

if __name__ == "__main__":
    main()
