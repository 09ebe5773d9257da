"""What a user may pass to ``encode``: texts, images, and both."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

ImageSource = Image.Image | Path | bytes
Input = str | ImageSource | Mapping[str, Any]
"""A str is a text; a PIL image, a Path or bytes an image; a mapping has text, image or both."""


class InputError(ValueError):
    """A bad input of a call to ``encode``."""

    def __init__(self, position: int, reason: str) -> None:
        """``position`` counts from 0; ``reason`` is one line without it."""
        super().__init__(f"input {position}: {reason}")
        self.position, self.reason = position, reason


def split_input(item: Input) -> tuple[str | None, ImageSource | str | None]:
    """Give (text, image source). Raises ValueError: neither, an unknown key or a bad type."""
    if isinstance(item, str):
        return item, None
    if isinstance(item, Image.Image | Path | bytes):
        return None, item
    if isinstance(item, Mapping):
        if unknown := set(item) - {"text", "image"}:
            raise ValueError(f"unknown key {min(unknown)!r}: expected 'text', 'image' or both")
        text, image = item.get("text"), item.get("image")
        if text is None and image is None:
            raise ValueError("neither 'text' nor 'image' is given")
        if text is not None and not isinstance(text, str):
            raise ValueError(f"'text' is a {type(text).__name__}, expected a str")
        if image is not None and not isinstance(image, str | Image.Image | Path | bytes):
            kind = type(image).__name__
            raise ValueError(f"'image' is a {kind}, expected a path, bytes or a PIL image")
        return text, image
    raise ValueError(
        f"unsupported input of type {type(item).__name__}: expected str, PIL image, Path, bytes or "
        "a mapping with 'text' and/or 'image'"
    )


def split_modalities(item: Input) -> tuple[Input, ...]:
    """An input with text and image as two; any other, also a bad one, as it is."""
    if not isinstance(item, Mapping) or None in (item.get("text"), item.get("image")):
        return (item,)
    return tuple({k: v for k, v in item.items() if k != other} for other in ("image", "text"))
