"""Commands between Hugging Face or GGUF checkpoints and converted folders (e5v_jax/checkpoints)."""
