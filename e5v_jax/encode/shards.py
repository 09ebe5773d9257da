"""One shard of a bulk run: its files, and the seal by which a damaged one is found.

    shard-00000.parquet       columns id and embedding; or .npy, with the ids in .ids.json
    shard-00000.failed.jsonl  with --on-error skip: id, place and reason of each row left out
    shard-00000.truncated.jsonl  with --truncate: id and place of each row whose text was cut
    shard-00000.sha256        the hashes of these files, for ``sha256sum -c`` too

The seal is written last. A shard without it, or with a file that is not what it says, is not whole.
"""

import hashlib
import io
import json
from collections.abc import Mapping
from operator import methodcaller
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from e5v_jax.atomic import write_whole
from e5v_jax.encode.vectors import save_vectors, to_json

_IDS, _SEAL = ".ids.json", ".sha256"
Note = Literal["failed", "truncated"]
"""Which rows are listed beside a shard."""


def write_shard(
    path: Path, ids: list[str], vectors: np.ndarray, notes: Mapping[Note, list[dict[str, str]]]
) -> None:
    """Write the shard ``path``: vectors [N, D] in their dtype, and ``notes``; sealed last.

    Raises OSError: the disk is full or the like.
    """
    buffer = io.BytesIO()
    save_vectors(buffer, path.suffix, ids, vectors)
    files = {path: buffer.getvalue()}
    if path.suffix == ".npy":
        files[path.with_suffix(_IDS)] = to_json(ids)
    for note, rows in notes.items():
        if rows:
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            files[_note(path, note)] = lines.encode()
        else:  # what a damaged one left
            _note(path, note).unlink(missing_ok=True)
    # The shard's own line is the last: without it a seal that was cut is none.
    seal = "".join(_seal(file, files[file]) for file in sorted(files, key=path.__eq__))
    for file, data in {**files, path.with_suffix(_SEAL): seal.encode()}.items():
        write_whole(file, methodcaller("write", data))


def is_whole(path: Path) -> bool:
    """Whether all files of the shard ``path`` are there as they were written."""
    names = _sealed(path)
    try:
        return path in names and all(
            _seal(file, file.read_bytes()) == x for file, x in names.items()
        )
    except OSError:
        return False


def note_lines(path: Path, note: Note) -> bytes:
    """Read the notes of a whole shard, as json lines. Raises ValueError: it is not sealed."""
    names = _sealed(path)
    if path not in names:
        raise ValueError(f"{path}: missing or not whole; start the command again to make it")
    file = _note(path, note)
    return file.read_bytes() if file in names else b""


def read_shard(path: Path) -> tuple[list[str], np.ndarray]:
    """Read the ids and vectors [N, D] of a shard, compared with its seal.

    Raises ValueError: a file of it is missing or damaged, by name, the seal included.
    """
    sealed, files = _sealed(path), {}
    if path not in sealed:
        raise _damaged(path.with_suffix(_SEAL), "no seal of the shard")
    for file in (path, *([path.with_suffix(_IDS)] if path.suffix == ".npy" else [])):
        try:
            files[file] = file.read_bytes()
            if sealed.get(file) != _seal(file, files[file]):
                raise ValueError("it is not what was written")
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise _damaged(file, reason) from error
    try:
        if path.suffix == ".npy":
            vectors = np.load(io.BytesIO(files[path]))
            ids = json.loads(files[path.with_suffix(_IDS)].decode("utf-8", "surrogatepass"))
        else:
            import pyarrow.parquet as pq

            table = pq.read_table(io.BytesIO(files[path]))
            ids = table["id"].to_pylist()
            flat = table["embedding"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
            vectors = flat.reshape(len(table), table.schema.field("embedding").type.list_size)
        if len(ids) != len(vectors):
            raise ValueError(f"{len(ids)} ids and {len(vectors)} vectors")
    except Exception as error:  # NumPy and Arrow raise many types for damaged bytes
        raise _damaged(path, error) from error
    return ids, vectors


def _damaged(file: Path, reason: object) -> ValueError:
    return ValueError(f"{file}: damaged ({reason}); start the command again to make it anew")


def _note(path: Path, note: Note) -> Path:
    return path.with_suffix(f".{note}.jsonl")


def _seal(file: Path, data: bytes) -> str:
    return f"{hashlib.sha256(data).hexdigest()}  {file.name}\n"


def _sealed(path: Path) -> dict[Path, str]:
    """Give the lines of the seal of ``path`` by the file that each is for; none if it has none."""
    try:
        lines = path.with_suffix(_SEAL).read_bytes().decode("ascii").splitlines(keepends=True)
    except (OSError, ValueError):
        return {}
    notes = (_note(path, note) for note in get_args(Note))
    files = {x.name: x for x in (path, path.with_suffix(_IDS), *notes)}
    found = {line[66:].removesuffix("\n"): line for line in lines}
    return {files[name]: found[name] for name in found} if found.keys() <= files.keys() else {}
