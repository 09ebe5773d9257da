"""The LLaVA-NeXT model in flax.nnx: CLIP tower, projector, anyres merge, Llama decoder."""
