"""How far an update of an index is, on a terminal."""

import sys
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import Progress as Bars

from e5v_jax.search.index import Progress


class UpdateProgress(Progress):
    """Two bars while there is a terminal: files compared, and files embedded."""

    def __init__(self) -> None:
        """Show nothing yet."""
        self._bars = Bars(
            console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True
        )
        self._scan = self._embed = self._bars.add_task("comparing files", total=None, start=False)

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bars.stop()

    def scanning(self, files: int) -> None:
        """So many files are there."""
        self._bars.start_task(self._scan)
        self._bars.update(self._scan, total=files)

    def scanned(self) -> None:
        """One of them was compared."""
        self._bars.advance(self._scan)

    def reading(self, files: int) -> None:
        """So many of them are new or edited."""
        if files:
            self._embed = self._bars.add_task("embedding", total=files)

    def read(self, files: int) -> None:
        """So many more of these are in the index."""
        self._bars.advance(self._embed, files)
