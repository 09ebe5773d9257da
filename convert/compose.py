"""``python -m convert.compose LLM TOWER DST``: a decoder and a tower -> a converted folder."""

from e5v_jax.checkpoints.commands import compose

if __name__ == "__main__":
    compose()
