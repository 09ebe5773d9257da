"""How the server's batches are shared out, and which threads wait for which."""

import os
import sys
import threading
from collections.abc import Sequence

import numpy as np
import pytest

from e5v_jax.families.base import BatchShape, Measured
from e5v_jax.serve.server import give_way
from e5v_jax.serve.shapes import fitting_shape, grow_batch, row_counts


def padded(length: int, key: int) -> int:
    return -(-length // 8) * 8 + 100 * key


def measured(lengths: Sequence[int]) -> list[Measured]:
    return [Measured(position=i, ids=[], length=n) for i, n in enumerate(lengths)]


@pytest.mark.parametrize(
    ("lengths", "taken", "shape"),
    [
        ([20] * 42, [20] * 42, (42, 24)),
        ([20] * 200, [20] * 42, (42, 24)),  # what the budget holds
        ([20] * 27, [20] * 16, (16, 24)),  # of 32 rows too many would be empty
        ([20] * 28, [20] * 28, (32, 24)),
        ([3, 20, 5], [3, 5, 20], (4, 24)),
        ([3] * 5, [3] * 5, (8, 8)),  # a small batch is not cut
        ([20, 40, 8, 21, 44, 7] * 16, [20] * 16 + [21] * 16, (32, 24)),  # its likes
        ([2000], [2000], (1, 2000)),  # longer than the budget
        ([2000, 2000, 3], [2000], (1, 2000)),
    ],
)
def test_a_batch_grows_around_the_first(
    lengths: list[int], taken: list[int], shape: tuple[int, int]
) -> None:
    items = measured(lengths)
    found, size = grow_batch(items, items[0], padded, max_tokens=1024)
    assert sorted(item.length for item in found) == sorted(taken)
    assert items[0] in found and (size.rows, size.length) == shape
    found, size = grow_batch(items, items[0], padded, max_tokens=1024, multiple=4)
    assert size.rows % 4 == 0 and len(found) <= size.rows


def test_every_item_has_its_turn() -> None:
    """Batch after batch, whatever waits: within the budget, of declared rows, none left behind."""
    rng = np.random.default_rng(0)
    for count in (1, 7, 40, 300):
        waiting = measured(rng.integers(1, 300, count).tolist())
        while waiting:
            found, shape = grow_batch(waiting, waiting[0], padded, max_tokens=1024)
            assert waiting[0] in found and 1 <= len(found) <= shape.rows
            assert shape.length == padded(max(item.length for item in found), 0)
            assert shape.rows * shape.length <= 1024
            assert shape.rows in row_counts(shape, 1024, 1)
            taken = {item.position for item in found}
            waiting = [item for item in waiting if item.position not in taken]


def test_the_smallest_compiled_shape_that_holds_a_batch() -> None:
    compiled = [BatchShape(rows, length, 0) for rows in (8, 32) for length in (24, 32)]
    wanted = BatchShape(22, 24, 0)
    assert fitting_shape(wanted, 22, compiled) == BatchShape(32, 24, 0)
    assert fitting_shape(wanted, 7, compiled) == BatchShape(8, 24, 0)
    assert fitting_shape(wanted, 33, compiled) == wanted


@pytest.mark.skipif(sys.platform != "linux", reason="priorities of threads are Linux's")
def test_threads_that_compute_give_way() -> None:
    found: dict[str, int] = {}

    def note(name: str) -> None:
        found[name] = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    def load() -> None:
        give_way()
        note("loader")
        child = threading.Thread(target=note, args=("started by it",))
        child.start()
        child.join()

    note("before")
    thread = threading.Thread(target=load)
    thread.start()
    thread.join()
    note("main")
    assert found["main"] == found["before"]
    assert found["loader"] == found["started by it"] == min(found["before"] + 5, 19)
