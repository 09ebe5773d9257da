"""Paths in a Cloud Storage bucket, ``gs://bucket/folder``, beside those of this machine.

Arrays are read and written there by Orbax itself. Everything else goes through epath, which Orbax
and tensorflow-datasets use too: pathlib's methods, on gcsfs. A bucket has neither folders nor
renames, but an object appears only when it is whole.
"""

import glob
import importlib.util
import logging
import os
import shutil
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, cast

# Files that say that the folder they are in is whole: uploaded last.
_LAST = ("config.json", "adapter_config.json", "run.json")
_ANSWER_WITHIN = 10.0  # seconds


def as_path(path: str | os.PathLike[str]) -> Path:
    """A ``Path``; for ``gs://`` an epath with the same methods, which ``Path`` would make local.

    Raises ImportError: a bucket, and gcsfs is not installed.
    """
    if not os.fspath(path).startswith("gs://"):
        return Path(path)
    if importlib.util.find_spec("gcsfs") is None:
        raise ImportError(f"{path}: needs gcsfs: pip install -e '.[gcs]', or mount the bucket")
    os.environ.setdefault("EPATH_USE_TF", "0")  # one way to the bucket, with TensorFlow or without
    # asks for a bucket's kind first, with credentials of its own; ours are read like any other
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    # it logs the traceback of what it also raises
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    import fsspec  # here and below: loaded for buckets only
    from etils import epath

    # what another process has written must be seen
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    return cast(Path, epath.Path(path))


def in_bucket(path: str | os.PathLike[str]) -> bool:
    """Whether ``path`` is in a bucket rather than on this machine."""
    return os.fspath(path).startswith("gs://")


@cache
def check_reachable(path: str) -> None:
    """Refuse a bucket that does not answer, before gcsfs tries for a minute; others pass.

    Raises ConnectionError: there is no network; PermissionError: the credentials do not suffice.
    """
    if not in_bucket(path):
        return
    as_path(path)  # gcsfs is there
    host = os.environ.get("STORAGE_EMULATOR_HOST") or "https://storage.googleapis.com"
    try:
        url = host if "://" in host else f"http://{host}"
        urllib.request.urlopen(url, timeout=_ANSWER_WITHIN).close()
    except urllib.error.HTTPError:
        pass  # it answers
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise ConnectionError(
            f"{path}: {host} does not answer ({getattr(reason, 'strerror', None) or reason}): is "
            "there a network? Or give a path on this machine"
        ) from None
    try:
        _filesystem().info(path)
    except FileNotFoundError:
        pass  # to be told by who needs it
    except Exception as error:  # gcsfs and google.auth raise many types
        reason = " ".join(str(error).split())
        raise PermissionError(
            f"{path}: Cloud Storage refuses ({reason}): log in with gcloud auth "
            "application-default login, or name a key in GOOGLE_APPLICATION_CREDENTIALS"
        ) from None


def absolute(path: str | os.PathLike[str]) -> Path:
    """``path`` as Orbax wants it."""
    return as_path(path) if in_bucket(path) else Path(path).absolute()


@contextmanager
def without_wildcards(folder: Path) -> Iterator[Path]:
    """``folder``, absolute, under a name that Orbax does not take for a pattern.

    Orbax looks for files with ``glob``, so that it finds none where a folder's own name has ``[``,
    ``*`` or ``?``: what it writes there is not whole. Such a one gets a link for as long.
    """
    if in_bucket(folder) or not glob.has_magic(str(Path(folder).absolute())):
        yield absolute(folder)
        return
    with tempfile.TemporaryDirectory() as place:
        link = Path(place, "folder")
        link.symlink_to(Path(folder).absolute(), target_is_directory=True)
        yield link


def remove_folder(folder: Path) -> None:
    """Delete ``folder`` and what is in it, if it is there."""
    if not in_bucket(folder):
        shutil.rmtree(folder, ignore_errors=True)
    elif folder.exists():
        _filesystem().rm(str(folder), recursive=True)


def walk_files(folder: Path) -> list[Path]:
    """All files under ``folder``, sorted."""
    if in_bucket(folder):
        return [as_path(f"gs://{name}") for name in sorted(_filesystem().find(str(folder)))]
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def size_and_time(file: Path) -> tuple[int, str]:
    """Bytes of a file, and a string that changes when it is written again."""
    if in_bucket(file):
        info = _filesystem().info(str(file))
        return info["size"], info["generation"]
    status = file.stat()
    return status.st_size, str(status.st_mtime_ns)


def copy_file(src: Path, dst: Path) -> None:
    """Copy a file of this machine or of a bucket to this machine."""
    if in_bucket(src):
        _filesystem().get_file(str(src), str(dst))
    else:
        shutil.copyfile(src, dst)


def create_new(file: Path, content: bytes) -> bool:
    """Write a file just if there is none; of several programs that try at once, one succeeds."""
    try:
        if in_bucket(file):
            _filesystem().pipe_file(str(file), content, mode="create")
        else:
            with file.open("xb") as new:
                try:
                    new.write(content)
                    new.flush()
                except BaseException:
                    file.unlink()
                    raise
    except FileExistsError:
        return False
    return True


def upload(folder: Path, dst: Path) -> None:
    """Copy a local folder's files to a bucket, _LAST last. Raises FileNotFoundError: no bucket."""
    files = walk_files(folder)
    for last in (False, True):
        batch = [file for file in files if (file.name in _LAST) == last]
        targets = [str(dst / str(file.relative_to(folder))) for file in batch]
        try:
            if batch:
                _filesystem().put([str(file) for file in batch], targets)
        except FileNotFoundError:  # of gcsfs, naming an address
            raise FileNotFoundError(f"{targets[0]}: there is no such bucket to write to") from None


def _filesystem() -> Any:
    import fsspec

    return fsspec.filesystem("gcs")
