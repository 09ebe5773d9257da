"""``python -m convert.smooth MODEL DST``: the same model, more exact in int8."""

from e5v_jax.checkpoints.commands import smooth

if __name__ == "__main__":
    smooth()
