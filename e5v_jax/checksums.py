"""The sha256 of every file of a folder, to tell a flipped byte from what was written.

They are in FOLDER/checksums.json, which is written last. TensorStore has sums of its own for its
indices, not for the arrays.
"""

import hashlib
import json
from collections.abc import Collection
from pathlib import Path

from e5v_jax.atomic import write_whole
from e5v_jax.storage import walk_files

CHECKSUMS = "checksums.json"


class DamagedFileError(ValueError):
    """A file is not what was written; the message names it."""


def write_checksums(folder: Path) -> None:
    """Hash every file under ``folder``, in subfolders too. Raises OSError: one cannot be read."""
    sums = {name: sha256(file) for name, file in _files(folder).items()}
    content = json.dumps(sums, indent=1).encode() + b"\n"
    write_whole(folder / CHECKSUMS, lambda file: file.write(content))


def verify_checksums(
    folder: Path, *, only: Collection[str] = (), part: int = 0, parts: int = 1
) -> bool:
    """Compare every file with its sum, or every ``parts``-th from the ``part``-th on.

    ``only`` names the files to compare, of those that have a sum.

    It is False if the folder has no sums, as one of an earlier version. Files beside those that
    have one are passed over.

    Raises DamagedFileError: a file differs, is missing or has no readable sum; OSError: one cannot
    be read.
    """
    try:
        sums = json.loads((folder / CHECKSUMS).read_bytes())
    except FileNotFoundError:
        return False
    except (ValueError, IsADirectoryError, RecursionError) as error:
        raise DamagedFileError(f"{folder / CHECKSUMS}: not JSON ({error})") from error
    if not isinstance(sums, dict):
        raise DamagedFileError(f"{folder / CHECKSUMS}: expected an object of names and sums")
    for name in sorted(sums)[part::parts]:
        if not only or name in only:
            _verify(folder / name, sums[name])
    return True


def _verify(file: Path, expected: object) -> None:
    try:
        found = sha256(file)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise DamagedFileError(f"{file}: missing, but {CHECKSUMS} names it") from error
    if found != expected:
        raise DamagedFileError(f"{file}: differs from what was written (sha256 in {CHECKSUMS})")


def sha256(file: Path) -> str:
    """Hash a file, in hex; a part of it is in memory at a time."""
    with file.open("rb") as content:
        digest = hashlib.sha256()
        while block := content.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def _files(folder: Path) -> dict[str, Path]:
    named = {file.relative_to(folder).as_posix(): file for file in walk_files(folder)}
    return {name: file for name, file in named.items() if file.name != CHECKSUMS}
