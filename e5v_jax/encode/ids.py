"""Finds ids that are there twice, on disk, so that any number of them takes no memory."""

import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing

_FIND = """
    SELECT later.row, later.id, later.place, earlier.place
    FROM (SELECT id, min(row) AS row FROM ids GROUP BY id HAVING count(*) > 1) AS taken
    JOIN ids AS earlier ON earlier.row = taken.row
    JOIN ids AS later ON later.id = taken.id AND later.row > taken.row
    ORDER BY later.row
"""


def repeated_ids(rows: Iterable[tuple[str, str]]) -> Iterator[tuple[int, str, str]]:
    """Find every row but the first of each id, given the id of each row and where it is.

    SQLite has them in a temporary file in ``SQLITE_TMPDIR``, ``TMPDIR`` or /var/tmp. After the last
    row come the number of each such row, from 0, where it is, and what is wrong with it, in order.

    Raises OSError: the disk is full or the like.
    """
    encoded = (
        (row, *(word.encode("utf-8", "surrogatepass") for word in words))  # file names may need it
        for row, words in enumerate(rows)
    )
    try:
        with closing(sqlite3.connect("")) as database:
            for setting in ("journal_mode = OFF", "synchronous = OFF", "cache_size = -8192"):  # KiB
                database.execute(f"PRAGMA {setting}")
            database.execute("CREATE TABLE ids (row INTEGER PRIMARY KEY, id BLOB, place BLOB)")
            database.executemany("INSERT INTO ids VALUES (?, ?, ?)", encoded)
            database.execute("CREATE INDEX by_id ON ids (id, row)")
            for row, *words in database.execute(_FIND):
                id, where, first = (word.decode("utf-8", "surrogatepass") for word in words)
                yield row, where, f"id {id!r} is taken: see {first}"
    except sqlite3.Error as error:
        raise OSError(f"temporary file of ids: {error}; TMPDIR names its folder") from error
