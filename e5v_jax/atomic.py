"""Files and folders that have their name only once they are whole, here or in a bucket."""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from e5v_jax.exits import full_disk
from e5v_jax.storage import absolute, in_bucket, remove_folder, upload


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let ``write`` fill a file that has the name ``path`` only once it is whole."""
    if in_bucket(path):
        with tempfile.TemporaryDirectory() as local:
            write_whole(Path(local, path.name), write)
            upload(Path(local), path.parent)
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with naming(path), temporary.open("wb") as file:
            write(file)
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give an error of a write, such as a full disk's, the name of the file, which it lacks.

    Of what TensorStore says on many lines it makes such an OSError too.
    """
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise
    except ValueError as error:
        if (number := full_disk(error)) is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def check_new(dst: Path) -> None:
    """Raise FileExistsError, before any work is done, where :func:`new_folder` would."""
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise FileExistsError(f"{dst}: already exists; choose another folder or delete it")


@contextmanager
def new_folder(dst: Path) -> Iterator[Path]:
    """A temporary sibling of ``dst`` that becomes ``dst`` when the block ends well, else vanishes.

    If ``dst`` is in a bucket, it is a temporary folder here, uploaded then. Raises FileExistsError:
    ``dst`` exists and is not an empty folder.
    """
    dst = absolute(dst)
    check_new(dst)
    if in_bucket(dst):
        with tempfile.TemporaryDirectory() as local:
            yield Path(local)
            check_new(dst)  # another program may have been faster
            upload(Path(local), dst)
        return
    dst.parent.mkdir(parents=True, exist_ok=True)
    temporary = dst.with_name(f".{dst.name}.{os.getpid()}.tmp")
    remove_folder(temporary)
    temporary.mkdir()
    try:
        with naming(dst):
            yield temporary
        check_new(dst)  # another program may have been faster
        temporary.rename(dst)  # replaces an empty folder
    finally:
        remove_folder(temporary)
