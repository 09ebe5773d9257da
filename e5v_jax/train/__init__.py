"""Contrastive training on text pairs: loss, step, checkpoints and the loop."""
