"""The size that an image is made: close to its own, whole blocks of patches, within a cap."""

import math
from collections.abc import Iterable

from e5v_jax.data.images import ImageError, Size

MAX_RATIO = 200
"""Of the longer side to the shorter one; the reference refuses what is thinner."""


def smart_resize(size: Size, *, factor: int, min_pixels: int, max_pixels: int) -> Size:
    """The (height, width) in multiples of ``factor`` that ``size`` is resized to.

    The aspect is kept as closely as they allow, and the area between the two limits (reference:
    ``smart_resize`` of qwen-vl-utils 0.0.14; rounding is Python's, half to even).

    Raises ImageError: no pixels, or a side more than ``MAX_RATIO`` times the other.
    """
    height, width = size
    if height < 1 or width < 1:
        raise ImageError(f"an image of {width}x{height} pixels, an image needs at least one")
    if max(size) / min(size) > MAX_RATIO:
        raise ImageError(
            f"an image of {width}x{height} pixels: one side is more than {MAX_RATIO} times the "
            "other, which the model's authors refuse: crop it"
        )
    # transformers has no max here: it makes images thinner than half a factor wider, too
    rows = max(factor, round(height / factor) * factor)
    columns = max(factor, round(width / factor) * factor)
    if rows * columns > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows = max(factor, math.floor(height / shrink / factor) * factor)
        columns = max(factor, math.floor(width / shrink / factor) * factor)
    elif rows * columns < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows = math.ceil(height * grow / factor) * factor
        columns = math.ceil(width * grow / factor) * factor
    return rows, columns


def resize_steps(size: Size, *, factor: int, limits: Iterable[tuple[int, int]]) -> list[Size]:
    """The sizes that :func:`smart_resize` makes of ``size``, one after the other.

    ``limits`` are the least and most pixels of each. Raises ImageError: as there.
    """
    found = []
    for least, most in limits:
        size = smart_resize(size, factor=factor, min_pixels=least, max_pixels=most)
        found.append(size)
    return found
