"""Which items share a device batch: sorted by length, cut by a token budget, in few shapes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from e5v_jax.families.base import BatchShape, Measured

_ROWS = tuple(4**i for i in range(10))
"""Row counts of a batch that its items do not fill."""


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
    rows have more: the number of rows is a multiple of these devices that share a batch. For
    ``padded_length`` see :meth:`e5v_jax.families.base.Processor.padded_length`.

    Raises:
        ValueError: an item is longer than the longest padded length.
    """
    ordered = sorted(items, key=lambda item: (-item.shape_key, -item.length))
    for key, group in groupby(ordered, key=lambda item: item.shape_key):
        waiting = list(group)
        start = 0
        while start < len(waiting):
            length = padded_length(waiting[start].length, key)
            rows = max(1, max_tokens // length)
            rows = _round_up(rows if max_rows is None else min(rows, max_rows), multiple)
            taken = rows if max_rows is None else min(rows, max_rows)
            members = waiting[start : start + taken]
            start += taken
            if len(members) < taken:
                enough = next(n for n in _ROWS if n >= len(members))
                rows = min(rows, _round_up(enough, multiple))
            yield Batch(members, BatchShape(rows, length, key))


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
