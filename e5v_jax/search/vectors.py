"""Where an index keeps its vectors: what each such place can do."""

from pathlib import Path
from typing import Any, Protocol

import numpy as np

from e5v_jax.search.matrix import MatrixFiles

FILES = "files"
LANCEDB = "lancedb"


class Vectors(Protocol):
    """The vectors of an index at one moment, to be searched; slots are their numbers."""

    dimensions: int

    def take(self, slots: list[int]) -> np.ndarray:
        """The vectors of some slots in their order, fp16 [n, D]."""
        ...

    def nearest(
        self, vector: np.ndarray, count: int, live: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """At most ``count`` of the slots ``live``, nearest to ``vector`` [D] first: int64 [k].

        With them their products with it, fp32 [k]; of equal ones, the lower slot comes first.
        """
        ...


class Place(Protocol):
    """What keeps the vectors. ``meta`` is what the database says, the only truth of what counts."""

    def open(self, meta: dict[str, Any]) -> Vectors:
        """The vectors that ``meta`` speaks of. Raises FileNotFoundError: they are not there."""
        ...

    def append(self, meta: dict[str, Any], vectors: np.ndarray) -> dict[str, Any]:
        """Write fp16 [n, D] from slot ``meta["slots"]`` on; gives what ``meta`` is to say."""
        ...

    def compact(
        self, meta: dict[str, Any], used: np.ndarray
    ) -> tuple[dict[str, Any], list[tuple[int, int]]]:
        """Give back room of slots that are not ``used``: what to say, (new, old) slots that move.

        Ascending, and no new one is above its old one.
        """
        ...

    def clear(self, meta: dict[str, Any]) -> None:
        """Remove all that ``meta`` does not speak of."""
        ...


def open_place(folder: Path, store: str) -> Place:
    """The place of an index in ``folder``. Raises ImportError: lancedb is not installed."""
    if store == FILES:
        return MatrixFiles(folder)
    from e5v_jax.search.lance import LanceTables  # an extra

    return LanceTables(str(folder / "vectors.lance") if store == LANCEDB else store)
