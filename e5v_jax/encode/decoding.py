"""Processes that decode images, ahead of the device: started again when one of them is killed."""

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor
from typing import Any

_logger = logging.getLogger("e5v_jax")
_RESTARTS = 10  # of a run: with more, something is wrong that the next start does not mend


class DecodingPool(Executor):
    """A ProcessPoolExecutor that goes on after a worker was killed, for want of memory perhaps.

    What was being worked on raises BrokenExecutor, and may be submitted again. Ctrl-C reaches this
    process alone, and the workers end with it.
    """

    def __init__(self, num_workers: int) -> None:
        """Prepare so many processes; they start with the first image."""
        self._num_workers, self._restarts = num_workers, 0
        self._pool = self._start()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Have a worker call ``fn``. Raises OSError: they were killed too often or do not start."""
        try:
            return self._submit(fn, *args, **kwargs)
        except BrokenExecutor:
            self._restart()
            return self._submit(fn, *args, **kwargs)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the processes."""
        self._pool.shutdown(wait, cancel_futures=cancel_futures)

    def _start(self) -> ProcessPoolExecutor:
        # JAX has threads, which a fork would lose
        spawn = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(self._num_workers, spawn, initializer=_end_with_parent)

    def _submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        # Processes start here, and inherit what signals are blocked.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return self._pool.submit(fn, *args, **kwargs)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _restart(self) -> None:
        self._restarts += 1
        if self._restarts > _RESTARTS:
            raise OSError(
                f"processes that decode images were killed {self._restarts} times: is memory "
                "short? Give fewer --num-workers, or none for threads"
            )
        self._pool.shutdown(wait=False)
        self._pool = self._start()
        try:
            self._submit(os.getpid).result()
        except BrokenExecutor:
            raise OSError(
                "processes that decode images die at their start: give --num-workers 0 for threads"
            ) from None
        _logger.warning(
            "a process that decodes images was killed; started again (%d of at most %d times)",
            self._restarts,
            _RESTARTS,
        )


def _end_with_parent() -> None:
    """End this worker when the process is gone that would have ended it, killed perhaps."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
