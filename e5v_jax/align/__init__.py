"""Alignment: next-token loss on captions of images, LLaVA's first stage, on the same loop."""
