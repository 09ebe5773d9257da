"""The embedding server: ``python -m e5v_jax.serve``."""
