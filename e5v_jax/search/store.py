"""An index on disk: SQLite says what there is, one file of fp16 vectors stands beside it.

    INDEX/index.sqlite     files, their rows (a photograph, a line, a paragraph), thumbnails
    INDEX/vectors-N.f16    the vectors [slots, D], each of unit length; N counts its rewritings
                           (or a table of LanceDB)

A vector belongs to a content, not to a file: what is equal is embedded once, and a copied or
renamed file costs nothing. Its slot is a row of the matrix. It becomes visible by a commit of
SQLite, after it is on the disk, and a slot is never written twice: so a kill leaves no half of
anything, and who searches meanwhile sees the index as it was or as it is.
"""

import json
import sqlite3
import threading
import uuid
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from e5v_jax.search.vectors import Vectors, open_place

Kind = Literal["image", "text"]
FORMAT = 1
DATABASE = "index.sqlite"
_WAIT = 10.0  # seconds for another program's commit
_MOST = 500  # values in one statement
_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE files (
    id INTEGER PRIMARY KEY, path TEXT NOT NULL UNIQUE, size INTEGER NOT NULL,
    mtime INTEGER NOT NULL, sha256 TEXT NOT NULL, error TEXT);
CREATE TABLE vectors (slot INTEGER PRIMARY KEY, content TEXT NOT NULL UNIQUE);
CREATE TABLE rows (
    id INTEGER PRIMARY KEY AUTOINCREMENT, file INTEGER NOT NULL REFERENCES files,
    line INTEGER, kind TEXT NOT NULL, text TEXT, slot INTEGER NOT NULL REFERENCES vectors);
CREATE INDEX rows_of_file ON rows (file);
CREATE INDEX rows_of_slot ON rows (slot);
CREATE TABLE thumbnails (
    content TEXT PRIMARY KEY, width INTEGER NOT NULL, height INTEGER NOT NULL,
    jpeg BLOB NOT NULL);
"""


class IndexFolderError(ValueError):
    """An index that is not there or cannot be used; the message is one line and names it."""


@dataclass(frozen=True)
class Row:
    """What is found: a photograph, or a line or paragraph of a text file."""

    id: int
    slot: int
    path: str
    kind: Kind
    line: int | None  # where a text starts in its file, from 1
    text: str | None
    width: int | None  # of a photograph's thumbnail, in pixels
    height: int | None


@dataclass(frozen=True)
class Snapshot:
    """The index between two commits; it is used inside :meth:`Store.reading`."""

    meta: dict[str, Any]  # what is said of the index as a whole
    vectors: Vectors
    live: np.ndarray  # int64, the slots that some row has, ascending
    _connection: sqlite3.Connection

    def check_identity(self, identity: object) -> None:
        """Refuse an index that was made anew with another model meanwhile.

        ``identity`` is what ``meta`` said when the model was chosen. Raises IndexFolderError.
        """
        if self.meta.get("identity") != identity:
            raise IndexFolderError(
                "the index was made anew with another model meanwhile: start this program again"
            )

    def rows_of(self, slots: Sequence[int]) -> dict[int, list[Row]]:
        """The rows of each slot, by path and line."""
        found: dict[int, list[Row]] = {}
        for start in range(0, len(slots), _MOST):
            some = [int(slot) for slot in slots[start : start + _MOST]]
            marks = ",".join("?" * len(some))
            for row in self._rows(f"rows.slot IN ({marks}) ORDER BY path, line", some):
                found.setdefault(row.slot, []).append(row)
        return found

    def blocks(self, size: int) -> Iterator[tuple[list[Row], np.ndarray]]:
        """Everything, by at most ``size`` contents: rows, and the vector of each, fp16 [n, D]."""
        for start in range(0, len(self.live), size):
            slots = self.live[start : start + size].tolist()
            rows = [row for found in self.rows_of(slots).values() for row in found]
            yield rows, self.vectors.take([row.slot for row in rows])

    def row(self, id: int) -> Row | None:
        """One row by its number; None if there is none any more."""
        return next(iter(self._rows("rows.id = ?", [id])), None)

    def thumbnail(self, id: int) -> bytes | None:
        """The JPEG of a photograph's row; None of another."""
        found = self._connection.execute(
            "SELECT jpeg FROM rows JOIN vectors USING (slot) JOIN thumbnails USING (content) "
            "WHERE rows.id = ?",
            [id],
        ).fetchone()
        return None if found is None else found[0]

    def _rows(self, where: str, values: Sequence[int]) -> list[Row]:
        found = self._connection.execute(
            "SELECT rows.id, rows.slot, path, kind, line, text, width, height FROM rows "
            "JOIN files ON files.id = rows.file JOIN vectors USING (slot) "
            f"LEFT JOIN thumbnails USING (content) WHERE {where}",
            values,
        )
        return [Row(*values) for values in found]


class Store:
    """An index that is searched, by any number of programs and threads."""

    def __init__(self, folder: Path) -> None:
        """Open the index in ``folder``. Raises IndexFolderError: there is none to be read."""
        if not (folder / DATABASE).is_file():
            raise IndexFolderError(
                f"{folder}: no index there; make one with python -m e5v_jax.search index"
            )
        self.folder = folder
        self._lock = threading.RLock()
        self._connection = connect(folder)
        self._place = open_place(folder, self.read_meta()["store"])
        self._vectors: tuple[tuple[object, ...], Vectors] | None = None
        self._live: tuple[tuple[int, int], np.ndarray] | None = None

    def close(self) -> None:
        """Give the files back."""
        self._connection.close()

    def read_meta(self) -> dict[str, Any]:
        """All that is said of the index as a whole, by its key."""
        with self._lock:
            return read_meta(self._connection)

    def count(self) -> dict[str, int]:
        """How many photographs, texts and files there are, and files that could not be read."""
        with self._lock:
            (images, texts), (files, failed) = (
                self._connection.execute(query).fetchone()
                for query in (
                    "SELECT coalesce(sum(kind = 'image'), 0), coalesce(sum(kind = 'text'), 0) "
                    "FROM rows",
                    "SELECT count(*), count(error) FROM files",
                )
            )
        return {"images": images, "texts": texts, "files": files, "failed": failed}

    @contextmanager
    def reading(self) -> Iterator[Snapshot]:
        """Give the index as it is now; what is committed meanwhile does not change it."""
        with self._lock:
            meta, vectors = self._begin()
            try:
                yield Snapshot(meta, vectors, self._find_live(), self._connection)
            finally:
                self._connection.execute("ROLLBACK")

    def _begin(self) -> tuple[dict[str, Any], Vectors]:
        """Begin to read: what is said of the index, and its vectors."""
        while True:
            self._connection.execute("BEGIN")
            meta = read_meta(self._connection)
            try:
                return meta, self._open(meta)
            except FileNotFoundError as error:
                self._connection.execute("ROLLBACK")
                # rewritten between the two lines, or lost
                if read_meta(self._connection)["generation"] == meta["generation"]:
                    missing = error.filename or error
                    raise IndexFolderError(
                        f"{missing}: missing; delete the index and make it again"
                    ) from error
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise

    def _open(self, meta: dict[str, Any]) -> Vectors:
        key = tuple(meta.get(name) for name in ("generation", "slots", "version"))
        if self._vectors is None or self._vectors[0] != key:
            self._vectors = (key, self._place.open(meta))
        return self._vectors[1]

    def _find_live(self) -> np.ndarray:
        (others,) = self._connection.execute("PRAGMA data_version").fetchone()
        changes = (others, self._connection.total_changes)
        if self._live is None or self._live[0] != changes:
            found = self._connection.execute("SELECT DISTINCT slot FROM rows ORDER BY slot")
            self._live = (changes, np.fromiter((slot for (slot,) in found), np.int64))
        return self._live[1]


def read_meta(connection: sqlite3.Connection) -> dict[str, Any]:
    """All values of ``meta``."""
    return {
        key: json.loads(value) for key, value in connection.execute("SELECT key, value FROM meta")
    }


def write_meta(connection: sqlite3.Connection, **values: Any) -> None:
    """Set values of ``meta``, any that JSON has."""
    connection.executemany(
        "INSERT INTO meta VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value",
        [(key, json.dumps(value)) for key, value in values.items()],
    )


def connect(folder: Path) -> sqlite3.Connection:
    """Open a folder's database. Raises IndexFolderError: it is none of this format, or damaged."""
    file = folder / DATABASE
    connection = sqlite3.connect(file, timeout=_WAIT, isolation_level=None, check_same_thread=False)
    try:
        # a commit is on the disk when it returns, and does not wait for readers
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        found = read_meta(connection).get("format")
    except sqlite3.Error as error:
        connection.close()
        raise IndexFolderError(f"{file}: {error}; delete the index and make it again") from error
    if found != FORMAT:
        connection.close()
        raise IndexFolderError(
            f"{folder}: an index of format {found}, expected {FORMAT}: made by another version of "
            "e5v_jax; delete it and make it again"
        )
    return connection


def create(folder: Path, store: str) -> None:
    """Make an empty index in a folder that has none; it is there only when whole.

    ``store`` is what :func:`e5v_jax.search.vectors.open_place` takes.

    Raises IndexFolderError: the folder has other things in it.
    """
    file = folder / DATABASE
    if file.exists():
        return
    left = [entry for entry in (folder.iterdir() if folder.exists() else ())]
    if not all(entry.match(f".{DATABASE}*") for entry in left):
        raise IndexFolderError(
            f"{folder}: not empty and no index; choose another folder for --index"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for entry in left:  # of a kill
        entry.unlink()
    temporary = folder / f".{DATABASE}.tmp"
    with closing(sqlite3.connect(temporary, isolation_level=None)) as connection:
        connection.executescript(f"BEGIN; {_SCHEMA}")
        empty: dict[str, Any] = {"generation": 0, "slots": 0, "dimensions": None, "roots": []}
        write_meta(connection, format=FORMAT, id=uuid.uuid4().hex, store=store, **empty)
        connection.execute("COMMIT")
    temporary.rename(file)
