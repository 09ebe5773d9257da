"""How the server's batches are shared out, and which threads wait for which."""

import os
import sys
import threading

import pytest

from e5v_jax.families.base import BatchShape, Measured
from e5v_jax.serve.server import give_way
from e5v_jax.serve.shapes import fitting_shape, share_out


def padded(length: int, key: int) -> int:
    return -(-length // 8) * 8 + 100 * key


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([20] * 64, (2, 32)),  # 42 rows of 24 fit: 42 and 22 would leave every other one half empty
        ([20] * 42, (1, 42)),
        ([20] * 43, (2, 22)),
        ([3, 20, 5], (1, 3)),
        ([2000], (1, 1)),  # longer than the budget
    ],
)
def test_equal_shares(lengths: list[int], expected: tuple[int, int]) -> None:
    items = [
        Measured(position=i, ids=[0] * length, length=length, shape_key=0)
        for i, length in enumerate(lengths)
    ]
    assert share_out(items, padded, 1024) == expected


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
