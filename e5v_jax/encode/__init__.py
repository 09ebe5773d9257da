"""Embedding texts, images and both: inputs, the jitted encoder and the command."""
