"""Which items share a device batch: sorted by length, cut by a token budget, in few shapes."""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from e5v_jax.families.base import BatchShape, Measured

_ROWS = tuple(4**i for i in range(10))  # of a batch that its items do not fill


@dataclass(frozen=True)
class Batch:
    """Items that go to the device together, and the shape they are padded to."""

    items: list[Measured]
    shape: BatchShape


def plan_batches(
    items: Sequence[Measured],
    *,
    padded_length: Callable[[int, int], int],
    max_rows: int | None,
    max_tokens: int,
    multiple: int,
) -> Iterator[Batch]:
    """Put every item in one batch, those of the largest shape key and then the longest first.

    So if the largest batch does not fit in memory, it fails at once. A batch has at most
    ``max_rows`` items, and at most ``max_tokens`` positions, padding included, unless ``multiple``
    rows have more: the number of rows is a multiple of these devices that share a batch. The last
    batch of a key keeps the shape of the one before it where it can, which is compiled already.

    Raises ValueError: an item is longer than the longest padded length.
    """
    limit = sys.maxsize if max_rows is None else max_rows

    def round_up(rows: int) -> int:
        return -(-rows // multiple) * multiple

    ordered = sorted(items, key=lambda item: (-item.shape_key, -item.length))
    for key, group in groupby(ordered, key=lambda item: item.shape_key):
        waiting, start, full = list(group), 0, None
        while start < len(waiting):
            length = padded_length(waiting[start].length, key)
            shape = BatchShape(0, length, key)
            rows = round_up(min(max(1, max_tokens // shape.size), limit))
            members = waiting[start : start + min(rows, limit)]
            start += len(members)
            shape = replace(shape, rows=rows)
            # few are left: fewer rows, unless that program would be one more for this length
            if len(members) < min(rows, limit) and shape != full:
                least = round_up(next(n for n in _ROWS if n >= len(members)))
                shape = replace(shape, rows=min(rows, least))
            full = shape
            yield Batch(members, shape)
