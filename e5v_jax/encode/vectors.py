"""Vectors that say something, and their files: one .npy or .parquet, there only when whole."""

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import BinaryIO

import numpy as np

from e5v_jax.atomic import write_whole
from e5v_jax.storage import in_bucket

OUTPUT_SUFFIXES = (".npy", ".parquet")
_SHORTEST = 1e-12  # a vector is scaled to unit length by its own, which must not be zero


def find_unusable(vectors: np.ndarray) -> np.ndarray:
    """Find the rows of vectors [N, D] that are not finite, or zero and so without a direction.

    One whose length does not fit in float32 counts as not finite. Returns positions, int [n].
    """
    with np.errstate(over="ignore", invalid="ignore"):
        squares = np.einsum("nd,nd->n", vectors, vectors, dtype=np.float32)
    return np.flatnonzero(~(np.isfinite(squares) & (squares > _SHORTEST**2)))


def check_output(path: Path) -> None:
    """Refuse an output file that could not be written, before anything is computed.

    Raises ValueError: another suffix; OSError: it exists, or its folder is missing or read-only.
    """
    if path.suffix not in OUTPUT_SUFFIXES:
        known = " or ".join(OUTPUT_SUFFIXES)
        raise ValueError(f"{path}: expected a name that ends in {known}, or a folder")
    if path.exists():
        raise FileExistsError(f"{path}: already exists; choose another name or delete it")
    if not in_bucket(path) and not os.path.lexists(path.parent):  # a bucket has no folders
        raise FileNotFoundError(f"{path.parent}: no such folder; create it first")
    check_folder(path.parent)


def check_folder(folder: Path) -> None:
    """Refuse a folder that could not be made or written to. Raises OSError: it, or one above."""
    if in_bucket(folder):
        try:
            any(folder.glob("*"))
        except FileNotFoundError:
            raise FileNotFoundError(f"{folder}: there is no such bucket to write to") from None
        return
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not there.is_dir():
        raise NotADirectoryError(f"{there}: not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"{there}: no permission to write there")


def write_vectors(path: Path, ids: list[str], vectors: np.ndarray) -> None:
    """Write vectors [N, D] in their dtype, in .parquet with ids; it appears only when whole.

    Raises OSError: the disk is full or the like.
    """
    write_whole(path, lambda file: save_vectors(file, path.suffix, ids, vectors))


def save_vectors(file: BinaryIO, suffix: str, ids: list[str], vectors: np.ndarray) -> None:
    """Save as :func:`write_vectors` to an open file, in the format that the suffix says."""
    if suffix == ".npy":
        # By write(), whose errors say why. Of what NumPy takes for a file of the disk it uses
        # tofile(), whose errors do not.
        np.save(SimpleNamespace(write=file.write), vectors)
        return
    # here and not above: the import takes a while and .npy does not need it
    import pyarrow as pa
    import pyarrow.parquet as pq

    embeddings = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
    table = pa.table({"id": pa.array(ids, pa.string()), "embedding": embeddings})
    pq.write_table(table, file)


def to_json(value: object) -> bytes:
    """Give the bytes of a json file; what of a path is not UTF-8 is kept."""
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    return text.encode("utf-8", "surrogatepass")
