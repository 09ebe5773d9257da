"""Host-side data: images, text and training pairs."""
