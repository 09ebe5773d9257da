"""Vectors on disk as a plain fp16 matrix [N, D], appended to and multiplied in blocks."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from e5v_jax.atomic import naming

_BLOCK = 2**19  # bytes of fp16 that are converted at a time: they stay in a core's cache
_MOVED = 4096  # vectors that are moved at a time when a file is rewritten
_WASTED = 0.5  # part of the slots that no row has, above which it is rewritten
_THREADS = min(4, os.cpu_count() or 1)
# Sign, exponent and mantissa of an fp16 number, moved to where fp32 has its own.
_FIELDS = np.array(0x8FFFE000, np.uint32).view(np.int32)[()]
_BIAS = np.float32(2.0**112)  # fp16 counts exponents from -15, fp32 from -127


def append_vectors(file: Path, at: int, vectors: np.ndarray) -> None:
    """Write fp16 vectors [n, D] as rows ``at`` to ``at + n``; on the disk when it returns.

    What is there already, left behind by a kill, is overwritten. Raises OSError: names the file.
    """
    assert vectors.dtype == np.float16
    with naming(file), open(os.open(file, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as matrix:
        matrix.seek(at * vectors.shape[1] * 2)
        matrix.write(np.ascontiguousarray(vectors).data)
        matrix.flush()
        os.fsync(matrix.fileno())
        if at == 0:
            sync_folder(file.parent)


def sync_folder(folder: Path) -> None:
    """Bring the names of new files to the disk, where the system can."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def map_vectors(file: Path, rows: int, dimensions: int) -> np.ndarray:
    """Map the first ``rows`` of a file into memory, fp16 [rows, D], read as they are needed.

    Raises FileNotFoundError: no such file; ValueError: it is shorter.
    """
    if rows == 0:
        return np.zeros((0, dimensions), np.float16)
    size, expected = file.stat().st_size, rows * dimensions * 2
    if size < expected:
        raise ValueError(
            f"{file}: {size} bytes, expected {expected} for {rows} vectors of {dimensions} "
            "dimensions: damaged; delete the index and make it again"
        )
    return np.memmap(file, np.float16, "r", shape=(rows, dimensions))


class MatrixVectors:
    """A matrix in memory, or mapped into it."""

    def __init__(self, matrix: np.ndarray) -> None:
        """Search ``matrix``, fp16 [slots, D]."""
        self.matrix, self.dimensions = matrix, matrix.shape[1]

    def take(self, slots: list[int]) -> np.ndarray:
        """See :class:`e5v_jax.search.vectors.Vectors`."""
        taken: np.ndarray = self.matrix[slots]
        return taken

    def nearest(
        self, vector: np.ndarray, count: int, live: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """See :class:`e5v_jax.search.vectors.Vectors`. Every vector is compared."""
        scores = score(self.matrix, vector)
        if live.size != len(scores):
            scores = scores[live]
        if count < scores.size:
            best = np.argpartition(-scores, count - 1)[:count]
        else:
            best = np.arange(scores.size)
        best = best[order(scores[best], best)]
        return live[best], scores[best]


class MatrixFiles:
    """The files ``vectors-N.f16`` in a folder; N counts as the database's ``generation``."""

    def __init__(self, folder: Path) -> None:
        """Keep vectors in ``folder``."""
        self._folder = folder

    def file(self, meta: dict[str, Any]) -> Path:
        """The file that ``meta`` speaks of."""
        return self._folder / f"vectors-{meta['generation']}.f16"

    def open(self, meta: dict[str, Any]) -> MatrixVectors:
        """See :class:`e5v_jax.search.vectors.Place`. Raises ValueError: the file is too short."""
        matrix = map_vectors(self.file(meta), meta["slots"], meta["dimensions"] or 0)
        return MatrixVectors(matrix)

    def append(self, meta: dict[str, Any], vectors: np.ndarray) -> dict[str, Any]:
        """See :class:`e5v_jax.search.vectors.Place`."""
        append_vectors(self.file(meta), meta["slots"], vectors)
        return {}

    def compact(
        self, meta: dict[str, Any], used: np.ndarray
    ) -> tuple[dict[str, Any], list[tuple[int, int]]]:
        """See :class:`e5v_jax.search.vectors.Place`. Only if most of the file is not used."""
        if len(used) >= meta["slots"] * (1 - _WASTED):
            return {}, []
        matrix = map_vectors(self.file(meta), meta["slots"], meta["dimensions"])
        told = {"generation": meta["generation"] + 1, "slots": len(used)}
        for start in range(0, len(used), _MOVED):
            append_vectors(self.file(told), start, matrix[used[start : start + _MOVED]])
        return told, [(at, int(slot)) for at, slot in enumerate(used) if at != slot]

    def clear(self, meta: dict[str, Any]) -> None:
        """See :class:`e5v_jax.search.vectors.Place`."""
        for file in self._folder.glob("vectors-*.f16"):
            if file != self.file(meta):
                file.unlink()


def order(scores: np.ndarray, slots: np.ndarray) -> np.ndarray:
    """The order of scores [n], highest first, and of equal ones the lower slot first."""
    return np.lexsort((slots, -scores))


def score(matrix: np.ndarray, vector: np.ndarray) -> np.ndarray:
    """Multiply finite fp16 vectors [N, D] with an fp32 one [D]: exact products, fp32 sums [N].

    Threads take a range of rows each. NumPy's own conversion from fp16 takes four times as long.
    """
    scores = np.empty(len(matrix), np.float32)
    if not matrix.size:
        return scores
    threads = min(_THREADS, max(1, matrix.nbytes // (4 * _BLOCK)))
    bounds = np.linspace(0, len(matrix), threads + 1).astype(int)

    def part(number: int) -> None:
        rows = slice(bounds[number], bounds[number + 1])
        _score_rows(matrix[rows], vector, scores[rows])

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(part, range(threads)))
    return scores


def _score_rows(rows: np.ndarray, vector: np.ndarray, scores: np.ndarray) -> None:
    """Fill ``scores`` [n]. Two fp16 numbers are one int32; each half becomes fp32 in its turn."""
    dimensions = rows.shape[1]
    if dimensions % 2 or not rows.flags.c_contiguous or rows.dtype.byteorder == ">":
        for start in range(0, len(rows), 256):
            scores[start : start + 256] = rows[start : start + 256].astype(np.float32) @ vector
        return
    words = rows.view(np.int32)  # [n, D / 2], the first of each pair in the lower half
    even, odd = (np.ascontiguousarray(vector[first::2]) * _BIAS for first in (0, 1))
    block = max(1, _BLOCK // (2 * dimensions))
    buffer = np.empty((block, dimensions // 2), np.int32)
    sums = np.empty(block, np.float32)
    for start in range(0, len(rows), block):
        pairs = words[start : start + block]
        half, out = buffer[: len(pairs)], scores[start : start + block]
        # The sign stays at the top while the rest moves down by 3 bits, which is the width by
        # which fp32's exponent is longer; subnormal numbers come out right, too.
        np.right_shift(pairs, 3, out=half)
        np.bitwise_and(half, _FIELDS, out=half)
        np.vecdot(half.view(np.float32), odd, out=out)
        np.left_shift(pairs, 16, out=half)
        np.right_shift(half, 3, out=half)
        np.bitwise_and(half, _FIELDS, out=half)
        np.vecdot(half.view(np.float32), even, out=sums[: len(pairs)])
        out += sums[: len(pairs)]
