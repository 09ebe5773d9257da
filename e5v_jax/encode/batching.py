"""Which items share a device batch: sorted by length, cut by a token budget, in few shapes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from e5v_jax.data.text import bucket_length
from e5v_jax.encode.inputs import Measured

# Fine where texts are many; beyond, at most a fifth of a sequence is padding.
_DOUBLINGS = [
    quarters * step for step in (32, 64, 128, 256, 512, 1024, 2048) for quarters in (5, 6, 7, 8)
]
TEXT_BUCKETS = (16, 20, 24, 28, 32, 36, 40, 48, 56, 64, 80, 96, 112, 128, *_DOUBLINGS)
IMAGE_BUCKETS = tuple(range(256, 16385, 128))
"""Multiples of what TPU's splash attention takes."""
_ROWS = tuple(4**i for i in range(10))
"""Row counts of a batch that its items do not fill."""


@dataclass(frozen=True)
class Batch:
    """Items that go to the device together, and the shape they are padded to."""

    items: list[Measured]
    rows: int
    length: int
    tiles: int
    """Tiles of each item; 0 for texts."""


def plan_batches(
    items: Sequence[Measured], *, max_rows: int | None, max_tokens: int, multiple: int
) -> Iterator[Batch]:
    """Every item in one batch, those with most tiles and then the longest first.

    So if the largest batch does not fit in memory, it fails at once.

    Args:
        items: in any order.
        max_rows: most items of a batch, or None.
        max_tokens: most positions of a batch, padding included; a longer item is a batch alone.
        multiple: of which the number of rows is one: devices that share a batch.

    Raises:
        ValueError: an item is longer than the longest bucket.
    """
    ordered = sorted(items, key=lambda item: (-item.num_tiles, -item.length))
    for tiles, group in groupby(ordered, key=lambda item: item.num_tiles):
        waiting = list(group)
        start = 0
        while start < len(waiting):
            length = bucket_length(waiting[start].length, IMAGE_BUCKETS if tiles else TEXT_BUCKETS)
            rows = max(1, max_tokens // length)
            rows = _round_up(rows if max_rows is None else min(rows, max_rows), multiple)
            members = waiting[start : start + rows]
            start += rows
            if len(members) < rows:
                enough = next(n for n in _ROWS if n >= len(members))
                rows = min(rows, _round_up(enough, multiple))
            yield Batch(members, rows, length, tiles)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
