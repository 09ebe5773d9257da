"""Weights in and out: Hugging Face, GGUF and PEFT files, and the converted folder."""
