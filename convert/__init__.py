"""Conversion between Hugging Face or GGUF checkpoints and this project's converted folders."""
