"""One program at a time works on an output folder, here, on a shared disk or in a bucket.

    RUNS/.NAME.lock      beside the folder RUNS/NAME, JSON: who holds it, renewed every 20 s

A kill leaves the file behind. On the machine of the holder it is known at once whether that process
is alive; of another machine's holder, whether the file is still renewed.
"""

import json
import logging
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from e5v_jax.atomic import naming, write_whole
from e5v_jax.distributed import from_first
from e5v_jax.storage import absolute, create_new, in_bucket

BEAT = 20.0  # seconds between renewals
_MOMENT = 0.1  # seconds; far more than from reading a file to deleting it
_DYING = 1.0  # seconds that a process may take to end after it was killed
SILENCE = 90.0  # seconds without one, after which the holder is taken for dead
_logger = logging.getLogger(__name__)


class LockedError(OSError):
    """Another program works on the same output."""


@dataclass(frozen=True)
class Lock:
    """A lock that is held."""

    file: Path
    id: str

    def check(self) -> None:
        """Raise LockedError where another program has taken the lock meanwhile.

        It may after a machine that slept, or that could not reach the file for ``SILENCE`` seconds.
        """
        found = _read(self.file)
        if found is not None and found.get("id") != self.id:
            holder = describe(found)
            raise LockedError(f"{self.file}: taken over by {holder}: two programs had one output")


@contextmanager
def hold(folder: Path) -> Iterator[Lock]:
    """Hold the lock of an output folder, which need not exist.

    Raises LockedError: another program holds it, or took it at the same moment; it may take
    ``SILENCE`` seconds to find out that one on another machine is alive.
    """
    folder = absolute(folder)
    file = folder.with_name(f".{folder.name}.lock")
    content = _identify()
    if not in_bucket(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    if file.is_dir():
        raise LockedError(f"{file}: a folder has the name of the lock: delete or rename it")
    try:
        while not _take(file, content) or not _stays(file, content):
            found = _read(file)
            if found is None:  # it is just being written, perhaps
                time.sleep(_MOMENT)
                found = _read(file)
            if _is_alive(file, found):
                raise LockedError(
                    f"{folder}: in use by {describe(found)}; wait for it or choose another output "
                    f"(if there is no such program, delete {file})"
                )
            if _read(file) == found:
                file.unlink(missing_ok=True)
                _logger.debug("%s: left behind by %s, taken over", file, describe(found))
        renewing = _Renewing(file, content)
        try:
            yield Lock(file, content["id"])
        finally:
            renewing.stop()
    finally:
        if _is_held_by(file, content["id"]):
            file.unlink(missing_ok=True)


@contextmanager
def hold_in_first(folder: Path) -> Iterator[Lock | None]:
    """Hold a lock in the first of several processes that work together; the others get None.

    Raises, in all of them, what :func:`hold` raises in the first.
    """
    with ExitStack() as stack:
        yield from_first(lambda: stack.enter_context(hold(folder)))


def _take(file: Path, content: dict[str, Any]) -> bool:
    """Whether there was no lock, and now is this one."""
    with naming(file):
        return create_new(file, _encode(content))


def _stays(file: Path, content: dict[str, Any]) -> bool:
    """Whether a new lock is still there in a moment.

    Who finds a dead holder's lock at the same moment may delete this one in its place.
    """
    time.sleep(_MOMENT)
    return _is_held_by(file, content["id"])


def _is_held_by(file: Path, id: str) -> bool:
    found = _read(file)
    return found is not None and found.get("id") == id


class _Renewing:
    """A thread that writes a lock anew every ``BEAT`` seconds, as long as it is this one's."""

    def __init__(self, file: Path, content: dict[str, Any]) -> None:
        self._file, self._content = file, content
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Return when the thread has ended, so that it writes no more."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(BEAT):
            with suppress(OSError):  # out of reach or full for now: the next time may do
                if not _is_held_by(self._file, self._content["id"]):
                    return
                content = _encode({**self._content, "beat": time.time()})
                _replace(self._file, content)


def _replace(path: Path, content: bytes) -> None:
    write_whole(path, lambda file: file.write(content))


def describe(content: dict[str, Any] | None) -> str:
    """Say who holds a lock."""
    if content is None:
        return "another program"
    words = "process {process} on {host} ({command}, since {since})"
    return words.format_map({"process": "?", "host": "?", "command": "?", "since": "?", **content})


def _identify() -> dict[str, Any]:
    """What tells this process from every other."""
    return {
        "id": uuid.uuid4().hex,
        "host": socket.gethostname(),
        "machine": _machine(),
        "process": os.getpid(),
        "started": _start_of(os.getpid()),
        "command": " ".join(sys.orig_argv[1:])[:80],
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "beat": time.time(),
    }


def _machine() -> str:
    """What is equal for two processes that can see each other, and for no others.

    A machine since it was booted and, as containers have numbers of their own, the space of these.
    """
    parts = [socket.gethostname()]
    with suppress(OSError):  # only Linux has them
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _start_of(process: int) -> str | None:
    """When a process of this machine began, as Linux counts; None elsewhere or if it is dead."""
    with suppress(OSError, IndexError):
        # the name, in brackets, may hold spaces
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] == "Z" else fields[19]  # Z: dead, its parent has not noticed
    return None


def _is_alive(file: Path, found: dict[str, Any] | None) -> bool:
    """Whether the holder of a lock still runs."""
    if found is not None and found.get("machine") == _machine():
        end = time.monotonic() + _DYING
        while (alive := _runs(found)) and time.monotonic() < end:
            time.sleep(_MOMENT)
        return alive
    _logger.warning("%s: held by %s; waiting for a sign of life", file, describe(found))
    end = time.monotonic() + SILENCE
    while time.monotonic() < end:
        time.sleep(SILENCE / 90)
        if _read(file) != found or not file.exists():
            return file.exists()  # renewed or changed hands; else it has just been released
    return False


def _runs(found: dict[str, Any]) -> bool:
    """Whether a process of this machine is there, and is no later one of the same number."""
    try:
        os.kill(int(found["process"]), 0)
    except ProcessLookupError:
        return False
    except (PermissionError, KeyError, ValueError, TypeError):
        return True
    return _start_of(found["process"]) == found.get("started")


def _read(file: Path) -> dict[str, Any] | None:
    """The content of a lock; None if there is none, or none that can be read yet."""
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _encode(content: dict[str, Any]) -> bytes:
    return json.dumps(content, indent=1).encode() + b"\n"
