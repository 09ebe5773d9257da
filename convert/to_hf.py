"""``python -m convert.to_hf SRC DST``: a converted folder -> Hugging Face or PEFT folder."""

from e5v_jax.checkpoints.commands import export

if __name__ == "__main__":
    export()
