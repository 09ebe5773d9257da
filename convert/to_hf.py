"""``python -m convert.to_hf SRC DST``: a converted folder -> Hugging Face or PEFT folder."""

from e5v_jax.checkpoints.to_hf import Args, convert, main

__all__ = ["Args", "convert", "main"]

if __name__ == "__main__":
    main()
