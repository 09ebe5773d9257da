"""SIGTERM, as pods and spot machines send it before they go: save, then stop."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax
from jax.experimental import multihost_utils


@contextmanager
def preemption() -> Iterator[Callable[[int], bool]]:
    """Note SIGTERM inside the block instead of obeying it.

    The block gets a function that says, in every process the same, whether to stop after a step.
    With several processes JAX's coordination service notes it, and makes all stop at one step.
    """
    if jax.process_count() > 1:
        yield lambda step: bool(multihost_utils.reached_preemption_sync_point(step))
        return
    if threading.current_thread() is not threading.main_thread():  # which alone may set a handler
        yield lambda _: False
        return
    noted: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: noted.append(number))
    try:
        yield lambda _: bool(noted)
    finally:
        signal.signal(signal.SIGTERM, before)
