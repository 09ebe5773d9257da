"""SIGTERM, as pods and spot machines send it before they go: save, then stop."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Self

import jax
from jax.experimental import multihost_utils


class Preemption:
    """Inside the block SIGTERM is noted instead of obeyed.

    With several processes JAX's coordination service notes it, and makes all stop at one step.
    """

    def __init__(self) -> None:
        self._noted = False
        self._before: signal.Handlers | object = None
        # signal.signal may only be called there; the coordination service needs no handler
        self._ours = (
            jax.process_count() == 1 and threading.current_thread() is threading.main_thread()
        )

    def __enter__(self) -> Self:
        if self._ours:
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._ours:
            signal.signal(signal.SIGTERM, self._before)  # type: ignore[arg-type]  # what it returned

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted = True

    def noted(self, step: int) -> bool:
        """Whether to stop after ``step``; the same answer in every process."""
        if jax.process_count() > 1:
            return bool(multihost_utils.reached_preemption_sync_point(step))
        return self._noted
