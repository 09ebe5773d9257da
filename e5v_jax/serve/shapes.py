"""The shapes that are compiled before the first request, and which of them a batch takes."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from PIL import Image

from e5v_jax.data.images import Size
from e5v_jax.families.base import BatchShape, Measured, Processor
from e5v_jax.presets import ROLES

_GROWTH = 2  # rows of the next larger shape
_WORDS = 64  # tokens of a text beside an image


def declare_shapes(
    processor: Processor,
    *,
    longest_text: int,
    images: Sequence[Size],
    max_tokens: int,
    multiple: int,
) -> list[BatchShape]:
    """List shapes for texts of up to ``longest_text`` tokens (0: none), and for some images.

    Tokens count the prompt and the template; sizes are (height, width) in pixels. Of each length
    there are 1, 2, 4, ... rows, up to what ``max_tokens`` positions hold, in multiples of
    ``multiple``, the devices that share a batch. Raises ValueError: no such text or image.
    """
    roles = [processor.preset.choose(role) for role in ROLES]
    shortest = min(one.length for role in roles for one in processor.measure(["a"], role))
    longest = min(longest_text, processor.longest(None))
    counts = range(min(shortest, longest), longest + 1)
    lengths = [(processor.padded_length(count, 0), 0) for count in counts if longest]
    for height, width in images:
        (measured,) = processor.measure(
            [Image.new("RGB", (width, height))], processor.preset.choose()
        )
        key = measured.shape_key
        lengths += [(processor.padded_length(measured.length + n, key), key) for n in (0, _WORDS)]
    shapes = []
    for length, key in dict.fromkeys(lengths):
        shape = BatchShape(0, length, key)
        most = max(1, max_tokens // shape.size)
        rows = {min(_GROWTH**power, most) for power in range(most.bit_length() + 1)} | {most}
        rows = {-(-count // multiple) * multiple for count in rows}
        shapes += [replace(shape, rows=count) for count in sorted(rows)]
    return shapes


def share_out(
    items: Sequence[Measured], padded_length: Callable[[int, int], int], max_tokens: int
) -> tuple[int, int]:
    """How many batches hold items of one shape key, and how many rows of each are then filled."""
    longest = max(items, key=lambda item: item.length)
    shape = BatchShape(0, padded_length(longest.length, longest.shape_key), longest.shape_key)
    batches = -(-len(items) // max(1, max_tokens // shape.size))
    return batches, -(-len(items) // batches)


def fitting_shape(wanted: BatchShape, items: int, compiled: Iterable[BatchShape]) -> BatchShape:
    """The smallest of the ``compiled`` shapes that holds so many items, or else ``wanted``."""
    holding = (
        shape
        for shape in compiled
        if shape.shape_key == wanted.shape_key
        and shape.length >= wanted.length
        and shape.rows >= items
    )
    return min(holding, key=lambda shape: (shape.rows * shape.length, shape.rows), default=wanted)


def read_size(text: str) -> Size:
    """Read ``640x480``, width first, as (height, width). Raises ValueError."""
    width, x, height = text.partition("x")
    if not (x and width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise ValueError(f"{text!r}: expected a width and a height in pixels, as 640x480")
    return int(height), int(width)
