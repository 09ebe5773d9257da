"""The progress of a bulk run: rates, padding and time left, on a terminal or as log lines."""

import logging
import sys
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from e5v_jax.encode.encoder import Statistics

_logger = logging.getLogger("e5v_jax")
_EVERY = 30.0  # seconds between log lines where there is no terminal


class BulkProgress(Progress):
    """This shows a bar on a terminal, else it logs a line every half minute."""

    def __init__(self, rows: int, statistics: Statistics) -> None:
        """Start counting ``rows`` of this process; ``statistics`` give tokens and padding."""
        super().__init__(
            TextColumn("{task.completed} of {task.total}"),
            BarColumn(),
            TextColumn("{task.fields[rates]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not sys.stderr.isatty(),
            transient=True,
        )
        self._bar = self.add_task("encoding", total=rows, rates="")
        self._statistics, self._tokens = statistics, statistics.tokens
        self._start = self._logged = time.monotonic()
        self._rows, self._done, self._encoded = rows, 0, 0

    def encoded(self, rows: int) -> None:
        """Count the rows of a finished batch."""
        self._encoded += rows
        self.passed(rows)

    def passed(self, rows: int) -> None:
        """Count rows that cannot be embedded, or that an earlier run embedded."""
        self._done += rows
        self.update(self._bar, advance=rows, rates=self.summary())
        now = time.monotonic()
        if self.disable and now - self._logged >= _EVERY:
            self._logged = now
            left = ""
            if self._encoded:  # nothing is, while a resumed run goes past what is there
                seconds = (now - self._start) / self._encoded * (self._rows - self._done)
                left = f", {seconds:.0f} s left"
            _logger.info("%d of %d rows, %s%s", self._done, self._rows, self.summary(), left)

    def summary(self) -> str:
        """Say how many items and tokens a second, and what part of all positions was padding."""
        seconds = max(time.monotonic() - self._start, 1e-9)
        tokens = self._statistics.tokens - self._tokens
        return (
            f"{self._encoded / seconds:.1f} items/s, {tokens / seconds:.0f} tokens/s, "
            f"{100 * self._statistics.padding:.1f} % padding"
        )
