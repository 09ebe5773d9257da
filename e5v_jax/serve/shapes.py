"""The shapes that are compiled before the first request, and which of them a batch takes."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from PIL import Image

from e5v_jax.data.images import Size
from e5v_jax.families.base import BatchShape, Measured, Processor
from e5v_jax.presets import ROLES

_GROWTH = 2  # rows of the next larger shape
_WORDS = 64  # tokens of a text beside an image
_FILLED = 0.85  # of the rows of a large batch at least, and of its longest row
_LARGE = 4  # a batch is large from the budget's fourth on: it takes longer than a smaller one


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
        shapes += [replace(shape, rows=n) for n in row_counts(shape, max_tokens, multiple)]
    return shapes


def row_counts(shape: BatchShape, max_tokens: int, multiple: int) -> list[int]:
    """How many rows batches of that length have: few numbers, up to what ``max_tokens`` hold."""
    most = max(1, max_tokens // shape.size)
    counts = {min(_GROWTH**power, most) for power in range(most.bit_length() + 1)}
    return sorted({-(-count // multiple) * multiple for count in counts})


def grow_batch(
    items: Sequence[Measured],
    first: Measured,
    padded_length: Callable[[int, int], int],
    *,
    max_tokens: int,
    multiple: int = 1,
) -> tuple[list[Measured], BatchShape]:
    """Take ``first`` and those of ``items``, all of its shape key, whose lengths are nearest to it.

    A large batch takes no others than those of about its length, and where too many of its rows
    would be padding it is cut to the next smaller number: the rest is not far behind. Raises
    ValueError: an item is longer than the longest padded length.
    """

    def is_large(positions: int) -> bool:
        return _LARGE * positions >= max_tokens

    ordered = sorted(items, key=lambda item: item.length)
    shapes = [
        BatchShape(0, padded_length(item.length, item.shape_key), item.shape_key)
        for item in ordered
    ]

    def fits(rows: int, low: int, high: int) -> bool:
        positions = rows * shapes[high].size
        alike = shapes[low].size >= _FILLED * shapes[high].size
        return positions <= max_tokens and (alike or not is_large(positions))

    low = high = next(i for i, item in enumerate(ordered) if item is first)
    order = [low]  # as they came in
    while True:
        rows, size = len(order) + 1, shapes[high].size
        sides = []  # (positions of padding that it brings, which)
        if low > 0:
            sides.append((size - shapes[low - 1].size, low - 1))
        if high + 1 < len(ordered):
            sides.append((len(order) * (shapes[high + 1].size - size), high + 1))
        sides = [side for side in sides if fits(rows, min(low, side[1]), max(high, side[1]))]
        if not sides:
            break
        _, taken = min(sides)
        low, high = min(low, taken), max(high, taken)
        order.append(taken)
    counts = row_counts(shapes[high], max_tokens, multiple)
    fewer = [n for n in counts if n <= len(order)]
    rows = next(n for n in counts if n >= len(order))
    if fewer and len(order) < _FILLED * rows and is_large(rows * shapes[high].size):
        rows = fewer[-1]
        order = order[:rows]
    return [ordered[i] for i in order], replace(shapes[max(order)], rows=rows)


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
