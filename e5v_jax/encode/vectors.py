"""Vector files: one .npy or .parquet, there only when whole."""

import json
import os
from pathlib import Path

import numpy as np

from e5v_jax.atomic import write_whole
from e5v_jax.storage import in_bucket

OUTPUT_SUFFIXES = (".npy", ".parquet")


def check_output(path: Path) -> None:
    """Refuse an output file that could not be written, before anything is computed.

    Raises ValueError: another suffix; OSError: it exists, or its folder is missing or read-only.
    """
    if path.suffix not in OUTPUT_SUFFIXES:
        known = " or ".join(OUTPUT_SUFFIXES)
        raise ValueError(f"{path}: expected a name that ends in {known}, or a folder")
    if path.exists():
        raise FileExistsError(f"{path}: already exists; choose another name or delete it")
    if not in_bucket(path) and not path.parent.is_dir():  # a bucket has no folders
        raise FileNotFoundError(f"{path.parent}: no such folder; create it first")
    if not in_bucket(path) and not os.access(path.parent, os.W_OK):
        raise PermissionError(f"{path.parent}: no permission to write there")


def write_vectors(path: Path, ids: list[str], vectors: np.ndarray) -> None:
    """Write vectors [N, D] in their dtype, in .parquet with ids; it appears only when whole.

    Raises OSError: the disk is full or the like.
    """
    if path.suffix == ".npy":
        write_whole(path, lambda file: np.save(file, vectors))
        return
    # here and not above: the import takes a while and .npy does not need it
    import pyarrow as pa
    import pyarrow.parquet as pq

    embeddings = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
    table = pa.table({"id": pa.array(ids, pa.string()), "embedding": embeddings})
    write_whole(path, lambda file: pq.write_table(table, file))


def write_json(path: Path, value: object) -> None:
    """Write ``value`` as json; ``path`` appears only when whole."""
    data = json.dumps(value, indent=1, ensure_ascii=False).encode("utf-8", "surrogatepass")
    write_whole(path, lambda file: file.write(data + b"\n"))
