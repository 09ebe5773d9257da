"""Faults that a test has the machine make."""

import multiprocessing
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from e5v_jax.families.base import Measured


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """As on a full disk: this process writes no file of more bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@dataclass
class KillWorker:
    """It loads an input as ``load`` does, but kills the worker process that is to load an image."""

    load: Callable[[Measured], Any]
    image: Path

    def __call__(self, item: Measured) -> Any:
        if multiprocessing.parent_process() is not None and item.image == self.image:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.load(item)
