"""Finds ids that are there twice, on disk, so that any number of them takes no memory."""

import sqlite3
from collections.abc import Iterator
from types import TracebackType
from typing import NamedTuple, Self

_WAITING = 4096  # rows that are written at a time


class Repeated(NamedTuple):
    """A row whose id an earlier row has."""

    row: int
    """From 0."""
    id: str
    where: str
    first: str
    """Where the first row with this id is."""

    @property
    def reason(self) -> str:
        """What is wrong with the row."""
        return f"id {self.id!r} is taken: see {self.first}"


class IdTable:
    """The ids of all rows and their places, in a temporary file that SQLite deletes.

    Its folder is that of the environment variable ``SQLITE_TMPDIR`` or ``TMPDIR``, else /var/tmp.
    Errors are raised as ``OSError``: the disk is full or the like.
    """

    def __init__(self) -> None:
        """Make an empty table."""
        self._database = sqlite3.connect("")
        self._waiting: list[tuple[int, bytes, bytes]] = []
        self._rows = 0
        for setting in ("journal_mode = OFF", "synchronous = OFF", "cache_size = -8192"):  # KiB
            self._database.execute(f"PRAGMA {setting}")
        self._database.execute("CREATE TABLE ids (row INTEGER PRIMARY KEY, id BLOB, place BLOB)")

    def __enter__(self) -> Self:
        """Give the table itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType
    ) -> None:
        """Delete the file; an error of SQLite becomes one of the system."""
        self._database.close()
        if isinstance(error, sqlite3.Error):
            raise OSError(f"temporary table of ids: {error}; TMPDIR names its folder") from error

    def add(self, id: str, where: str) -> None:
        """Append a row."""
        self._waiting.append((self._rows, _bytes(id), _bytes(where)))
        self._rows += 1
        if len(self._waiting) == _WAITING:
            self._write()

    def repeated(self) -> Iterator[Repeated]:
        """Every row but the first of each id, in order."""
        self._write()
        self._database.execute("CREATE INDEX IF NOT EXISTS by_id ON ids (id, row)")
        found = self._database.execute(
            """
            SELECT later.row, later.id, later.place, earlier.place
            FROM (SELECT id, min(row) AS row FROM ids GROUP BY id HAVING count(*) > 1) AS taken
            JOIN ids AS earlier ON earlier.row = taken.row
            JOIN ids AS later ON later.id = taken.id AND later.row > taken.row
            ORDER BY later.row
            """
        )
        for row, *words in found:
            yield Repeated(row, *(word.decode("utf-8", "surrogatepass") for word in words))

    def _write(self) -> None:
        self._database.executemany("INSERT INTO ids VALUES (?, ?, ?)", self._waiting)
        self._waiting.clear()


def _bytes(words: str) -> bytes:
    return words.encode("utf-8", "surrogatepass")  # json can say "\ud800"
