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

    def rows_of(shape: BatchShape) -> int:
        return round_up(min(max(1, max_tokens // shape.size), limit))

    ordered = sorted(items, key=lambda item: (-item.shape_key, -item.length))
    for key, group in groupby(ordered, key=lambda item: item.shape_key):
        waiting, start = list(group), 0
        before: BatchShape | None = None
        ends = [BatchShape(0, padded_length(waiting[i].length, key), key) for i in (0, -1)]
        one_length = ends[0] == ends[1]
        most = _spread(len(waiting), rows_of(ends[0])) if one_length else sys.maxsize
        while start < len(waiting):
            shape = BatchShape(0, padded_length(waiting[start].length, key), key)
            rows = round_up(min(rows_of(shape), most))
            members = waiting[start : start + min(rows, limit)]
            start += len(members)
            shape = replace(shape, rows=rows)
            # few are left: fewer rows, unless that program would be one more for this length
            if len(members) < min(rows, limit) and shape != before:
                least = round_up(next(n for n in _ROWS if n >= len(members)))
                shape = replace(shape, rows=min(rows, least))
            before = shape
            yield Batch(members, shape)


def _spread(count: int, rows: int) -> int:
    """Rows of each batch of ``count`` items: fewer than ``rows`` where as many batches hold them.

    So the last one is not nearly empty. Of many batches only the last is short, and ``rows`` is
    what they have; it is a few batches that share out theirs, in eighths: few numbers to compile.
    """
    batches = -(-count // rows)
    shares = (rows * eighths // 8 for eighths in range(4, 8))
    return next((n for n in shares if batches > 1 and n * batches >= count), rows)
