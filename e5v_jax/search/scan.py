"""What is to be indexed: the files of folders, what became of them, and what is in each."""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from e5v_jax.checksums import sha256
from e5v_jax.data.rows import read_rows
from e5v_jax.encode.files import IMAGE_SUFFIXES
from e5v_jax.search.store import Kind

TEXT_SUFFIXES = (".txt", ".md", ".jsonl")


class File(NamedTuple):
    """A file as it was when its content was hashed."""

    path: str  # absolute
    size: int  # bytes
    mtime: int  # nanoseconds
    sha256: str


class Part(NamedTuple):
    """What is embedded of a file: a photograph, or one of its texts."""

    content: str  # equal for what is embedded equally
    kind: Kind
    line: int | None = None  # where a text starts, from 1
    text: str | None = None


@dataclass
class Plan:
    """What became of the files since they were indexed."""

    changed: list[File] = field(default_factory=list)  # new or edited, sorted by path
    moved: list[tuple[int, File]] = field(default_factory=list)  # renamed; number in the index
    touched: list[tuple[int, File]] = field(default_factory=list)  # written, with the same content
    deleted: list[int] = field(default_factory=list)
    unchanged: int = 0
    new: int = 0  # of those changed
    failed: dict[str, str] = field(default_factory=dict)  # by path, why it cannot be read


def find_files(roots: Sequence[Path], index: Path) -> tuple[list[str], dict[str, str]]:
    """List the photographs and text files of folders, deep, and files that are named; sorted.

    Hidden files and folders, links to folders, the index itself and other kinds of files are left
    out. Beside them, by name: what is wrong with files and folders that cannot be listed.

    Raises FileNotFoundError: a root is not there; ValueError: one is a file of another kind.
    """
    found: set[str] = set()
    failed: dict[str, str] = {}

    def note(error: OSError) -> None:
        failed[printable(str(error.filename))] = error.strerror or str(error)

    def offer(path: str) -> None:
        if path.isascii() or _is_unicode(path):
            found.add(path)
        else:
            failed[printable(path)] = "its name is not UTF-8: rename it"

    for root in roots:
        if not root.exists():
            raise FileNotFoundError(
                f"{root}: no such file or folder; if it is gone for good, name another one, or "
                "--forget it"
            )
        if root.is_file():
            if not root.name.lower().endswith((*IMAGE_SUFFIXES, *TEXT_SUFFIXES)):
                known = ", ".join((*TEXT_SUFFIXES, *IMAGE_SUFFIXES))
                raise ValueError(f"{root}: unknown suffix {root.suffix!r}, expected {known}")
            offer(os.path.abspath(root))
            continue
        for folder, folders, names in os.walk(os.path.abspath(root), onerror=note):
            folders[:] = sorted(
                name
                for name in folders
                if not name.startswith(".") and os.path.join(folder, name) != str(index)
            )
            for name in names:
                path = os.path.join(folder, name)
                kind = name.lower().endswith((*IMAGE_SUFFIXES, *TEXT_SUFFIXES))
                if kind and not name.startswith(".") and os.path.isfile(path):
                    offer(path)
    return sorted(found), failed


def plan(
    paths: Sequence[str],
    failed: Mapping[str, str],
    known: Mapping[str, tuple[int, File]],
    roots: Sequence[Path],
    on_file: Callable[[], object] = lambda: None,
) -> Plan:
    """Compare what is there with what is indexed; a file of the same size and time is not read.

    ``paths`` and ``failed`` are as :func:`find_files` gives them. Only files of these ``roots``
    count as deleted, and none that is or may be among the ``failed``. A new file with the content
    of a deleted one is that one, renamed.
    """
    result = Plan(failed=dict(failed))
    there, unseen = set(paths), [Path(path) for path in failed]
    gone: dict[tuple[str, str], list[int]] = {}
    for path, (id, file) in known.items():
        if path not in there and is_under(path, roots) and not is_under(path, unseen):
            gone.setdefault(_kind(file), []).append(id)
    for path in paths:
        on_file()
        entry = known.get(path)
        try:
            status = os.stat(path)
            if entry is not None and entry[1][1:3] == (status.st_size, status.st_mtime_ns):
                result.unchanged += 1
                continue
            file = File(path, status.st_size, status.st_mtime_ns, sha256(Path(path)))
        except OSError as error:
            result.failed[path] = error.strerror or str(error)
            continue
        if entry is not None and entry[1].sha256 == file.sha256:
            result.touched.append((entry[0], file))
        elif entry is None and gone.get(_kind(file)):
            result.moved.append((gone[_kind(file)].pop(0), file))
        else:
            result.new += entry is None
            result.changed.append(file)
    result.deleted = sorted(id for ids in gone.values() for id in ids)
    return result


def _kind(file: File) -> tuple[str, str]:
    """What two files share that are read alike and hold the same."""
    suffix = os.path.splitext(file.path)[1].lower()
    return file.sha256, suffix if suffix in TEXT_SUFFIXES else "image"


def is_under(path: str, roots: Sequence[Path]) -> bool:
    """Whether a path is one of ``roots`` or in one of them."""
    return any(Path(path).is_relative_to(os.path.abspath(root)) for root in roots)


def is_unchanged(file: File) -> bool:
    """Whether a file still has the size and time that it had when its content was hashed."""
    try:
        status = os.stat(file.path)
    except OSError:
        return False
    return (status.st_size, status.st_mtime_ns) == (file.size, file.mtime)


def read_parts(file: File) -> tuple[list[Part], str | None]:
    """Give what is to be embedded of a file, and what is wrong with some of it.

    A photograph is one part. Each non-empty line of .txt is one, each paragraph of .md (between
    empty lines, with the headings right above it), each row of .jsonl that has a ``text``; its
    other keys are not read.

    Raises OSError, ValueError: the file cannot be read at all.
    """
    if not file.path.lower().endswith(TEXT_SUFFIXES):
        return [Part(f"image {file.sha256}", "image")], None
    parts, wrong = [], []
    for line, text in _texts(Path(file.path)):
        if isinstance(text, ValueError):
            wrong.append(f"line {line}: {text}")
        elif text.strip():
            digest = hashlib.sha256(text.strip().encode()).hexdigest()
            parts.append(Part(f"text {digest}", "text", line, text.strip()))
    more = f" (and {len(wrong) - 1} more lines)" if len(wrong) > 1 else ""
    return parts, f"{wrong[0]}{more}" if wrong else None


def _texts(file: Path) -> Iterator[tuple[int, str | ValueError]]:
    suffix = file.suffix.lower()
    if suffix == ".md":
        yield from _paragraphs(file)
        return
    for number, values in read_rows(file, lambda where, header: header):
        if not isinstance(values, dict):
            yield number, values or ValueError("no row")
            continue
        text = values.get("text")
        if not isinstance(text, str):
            what = "no text" if text is None else f"text is of type {type(text).__name__}"
            yield number, ValueError(f"{what}, expected a string under the key text")
        elif not _is_unicode(text):
            yield number, ValueError("text has half a character (a lone surrogate)")
        else:
            yield number, text


def _paragraphs(file: Path) -> Iterator[tuple[int, str]]:
    lines, start = list[str](), 1
    try:
        content = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start}): save it as UTF-8") from error
    for number, line in enumerate([*content.split("\n"), ""], start=1):
        if line.strip():
            start = start if lines else number
            lines.append(line.rstrip())
        elif lines and not all(line.startswith("#") for line in lines):
            yield start, "\n".join(lines)
            lines = []
    if lines:
        yield start, "\n".join(lines)


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= c <= "\udfff" for c in text)


def printable(path: str) -> str:
    """A path for a message and for SQLite, which knows no bytes that are not UTF-8."""
    return path.encode(errors="backslashreplace").decode()
