"""Changes of an index, each of them one commit; one program at a time (e5v_jax/lock.py)."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from e5v_jax.encode.vectors import find_unusable
from e5v_jax.search.photographs import Thumbnail
from e5v_jax.search.scan import File, Part
from e5v_jax.search.store import IndexFolderError, Store, create, read_meta, write_meta
from e5v_jax.search.vectors import FILES


class Writer(Store):
    """An index that is changed."""

    def __init__(self, folder: Path, store: str | None = None) -> None:
        """Open the index in ``folder``, or make an empty one that keeps its vectors in ``store``.

        Raises IndexFolderError: it cannot be used, or keeps them elsewhere; ImportError: lancedb.
        """
        create(folder, store or FILES)
        super().__init__(folder)
        meta = self.read_meta()
        if store not in (None, meta["store"]):
            raise IndexFolderError(
                f"{folder}: keeps its vectors in {meta['store']}, not in {store}; choose another "
                "--index"
            )
        self._place.clear(meta)  # what a kill left behind

    @contextmanager
    def commit(self) -> Iterator[None]:
        """Do all of the block or, where it fails or is killed, nothing."""
        with self._lock:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")

    def set_meta(self, **values: Any) -> None:
        """Say something of the index as a whole."""
        write_meta(self._connection, **values)

    def known_files(self) -> dict[str, tuple[int, File]]:
        """Every file of the index by its path, with its number."""
        found = self._connection.execute("SELECT id, path, size, mtime, sha256 FROM files")
        return {path: (id, File(path, *values)) for id, path, *values in found}

    def errors(self) -> dict[str, str]:
        """What is wrong with files, by their path."""
        return dict(
            self._connection.execute(
                "SELECT path, error FROM files WHERE error IS NOT NULL ORDER BY path"
            )
        )

    def slots_of(self, contents: Iterable[str]) -> dict[str, int]:
        """The slot of each content that has a vector."""
        found = {}
        for content in contents:
            if row := self._connection.execute(
                "SELECT slot FROM vectors WHERE content = ?", [content]
            ).fetchone():
                found[content] = row[0]
        return found

    def add_vectors(self, contents: Sequence[str], vectors: np.ndarray) -> None:
        """Append vectors [n, D] as fp16; inside :meth:`commit`, by which they become visible.

        Raises ValueError: one is zero or not finite, or the index has another D.
        """
        if not contents:
            return
        meta = read_meta(self._connection)
        dimensions = vectors.shape[1]
        if meta["dimensions"] not in (None, dimensions):
            raise ValueError(
                f"{self.folder}: vectors of {dimensions} dimensions, the index has "
                f"{meta['dimensions']}"
            )
        with np.errstate(over="ignore"):
            halves = vectors.astype(np.float16)
        if (bad := find_unusable(halves)).size:
            raise ValueError(f"{contents[bad[0]]}: its vector is zero or not finite in fp16")
        start = meta["slots"]
        told = self._place.append(meta, halves)
        self._connection.executemany(
            "INSERT INTO vectors VALUES (?, ?)", enumerate(contents, start=start)
        )
        self.set_meta(slots=start + len(contents), dimensions=dimensions, **told)

    def add_thumbnails(self, thumbnails: Mapping[str, Thumbnail]) -> None:
        """Keep the thumbnail of each content."""
        self._connection.executemany(
            "INSERT OR REPLACE INTO thumbnails VALUES (?, ?, ?, ?)",
            [(key, small.width, small.height, small.jpeg) for key, small in thumbnails.items()],
        )

    def put_file(self, file: File, parts: Sequence[Part], error: str | None) -> None:
        """Replace a file's rows by those of its ``parts``, which have vectors."""
        values = (file.path, file.size, file.mtime, file.sha256, error)
        (id,) = self._connection.execute(
            "INSERT INTO files (path, size, mtime, sha256, error) VALUES (?, ?, ?, ?, ?) "
            "ON CONFLICT (path) DO UPDATE SET size = excluded.size, mtime = excluded.mtime, "
            "sha256 = excluded.sha256, error = excluded.error RETURNING id",
            values,
        ).fetchone()
        self._connection.execute("DELETE FROM rows WHERE file = ?", [id])
        slots = self.slots_of(part.content for part in parts)
        self._connection.executemany(
            "INSERT INTO rows (file, line, kind, text, slot) VALUES (?, ?, ?, ?, ?)",
            [(id, part.line, part.kind, part.text, slots[part.content]) for part in parts],
        )

    def move_file(self, id: int, file: File) -> None:
        """Note another path, size or time of a file with the same content."""
        self._connection.execute(
            "UPDATE files SET path = ?, size = ?, mtime = ? WHERE id = ?",
            [file.path, file.size, file.mtime, id],
        )

    def drop_files(self, ids: Iterable[int]) -> None:
        """Drop files and their rows."""
        each = [(id,) for id in ids]
        self._connection.executemany("DELETE FROM rows WHERE file = ?", each)
        self._connection.executemany("DELETE FROM files WHERE id = ?", each)

    def begin_anew(self, **meta: Any) -> None:
        """Drop all but the roots, and say ``meta`` of what comes."""
        for table in ("rows", "files", "vectors", "thumbnails"):
            self._connection.execute(f"DELETE FROM {table}")
        generation = read_meta(self._connection)["generation"] + 1
        self.set_meta(generation=generation, slots=0, dimensions=None, **meta)

    def tidy(self) -> None:
        """Drop vectors and thumbnails that no row has, and give back their room."""
        with self.commit():
            self._connection.execute(
                "DELETE FROM vectors WHERE slot NOT IN (SELECT slot FROM rows)"
            )
            self._connection.execute(
                "DELETE FROM thumbnails WHERE content NOT IN (SELECT content FROM vectors)"
            )
            found = self._connection.execute("SELECT slot FROM vectors ORDER BY slot")
            used = np.fromiter((slot for (slot,) in found), np.int64)
            told, moves = self._place.compact(read_meta(self._connection), used)
            # ascending, and never above the old number: no two are equal on the way
            self._connection.executemany("UPDATE vectors SET slot = ? WHERE slot = ?", moves)
            self._connection.executemany("UPDATE rows SET slot = ? WHERE slot = ?", moves)
            self.set_meta(**told)
        self._place.clear(read_meta(self._connection))
