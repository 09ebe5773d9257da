"""Inputs of the encode command: rows of text, jsonl, csv and parquet files, folders of images."""

import glob
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any, NamedTuple

from e5v_jax.data.images import FORMATS, image_name
from e5v_jax.data.rows import EVERY_ROW, SUFFIXES, parquet_footer, read_rows
from e5v_jax.encode.ids import repeated_ids
from e5v_jax.storage import in_bucket

# What a folder is searched for; an image named by path may have any suffix.
IMAGE_SUFFIXES = tuple(sorted(chain(*FORMATS.values())))
_COLUMNS = ("id", "text", "image")
# Files whose rows may have ids of their own; file names and line numbers cannot repeat.
_WITH_IDS = (".jsonl", ".csv", ".parquet")
_HALF = re.compile(
    "[\ud800-\udfff]"
)  # half a character; in a file's name, a byte that is not UTF-8


@dataclass(frozen=True)
class Item:
    """One input."""

    where: str  # a person finds it there, for messages: "file:line" or the flag
    id: str
    value: dict[str, str | Path | bytes]  # "text" and/or "image", as E5V.encode takes it
    error: str | None = None  # why it cannot be embedded, if known by now; then it has no value


class Scan(NamedTuple):
    """What there is to embed, read once without keeping it."""

    rows: int
    fingerprint: str  # sha256 (hex) over ids, texts, image paths and the footers of Parquet files
    repeated: IO[bytes]  # json lines for rows whose id is taken: number, from 0, and what is wrong


def make_item(
    where: str, id: str, *, text: str | None, image: str | None, folder: Path = Path()
) -> Item:
    """Make an input whose ``image`` is a path relative to ``folder``."""
    return _item(where, id, {"text": text, "image": image}, folder)


def read_items(source: Path) -> tuple[list[Item], list[str]]:
    """Read all inputs, and the names of a folder's other entries. Raises as :func:`scan_items`."""
    scan_items(source, allow_errors=False)
    items = list(filter(None, iterate_items(source)))
    return items, list_folder(source)[1] if source.is_dir() else []


def scan_items(source: Path, *, allow_errors: bool) -> Scan:
    """Read all inputs once, but for images in Parquet files; with ``allow_errors`` bad rows count.

    It takes a few MB however many inputs there are, and room on the disk for their ids. A row of
    Parquet that has neither text nor image is not found yet if its images would be bytes.

    Raises OSError, ValueError: as :func:`iterate_items`, for no input, for a full disk, and without
    ``allow_errors`` for a bad row or a repeated id.
    """
    digest, rows, bad = hashlib.sha256(), 0, None
    files = _files(source)
    may_repeat = any(file.suffix.lower() in _WITH_IDS for file in files)

    def ids() -> Iterator[tuple[str, str]]:
        nonlocal rows, bad
        for item in filter(None, iterate_items(source, without_bytes=True)):
            if item.error is not None and not allow_errors:
                bad = f"{item.where}: {item.error}"
                return
            parts = (item.id, item.value.get("text"), item.value.get("image"))
            digest.update(repr(tuple(map(str, parts))).encode("utf-8", "surrogatepass"))
            rows += 1
            if may_repeat:
                yield item.id, item.where

    repeated = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the Scan
    for row, where, reason in repeated_ids(ids()):
        if not allow_errors:
            raise ValueError(f"{where}: {reason}")
        repeated.write(json.dumps([row, reason]).encode() + b"\n")
    if bad is not None or not rows:
        matched = files or source.is_dir()
        raise ValueError(bad or f"{source}: {'nothing to embed' if matched else 'matches no file'}")
    for file in files:
        if file.suffix.lower() == ".parquet":
            digest.update(parquet_footer(file))
    return Scan(rows, digest.hexdigest(), repeated)


def iterate_items(
    source: Path, wanted: Iterator[bool] = EVERY_ROW, *, without_bytes: bool = False
) -> Iterator[Item | None]:
    """Read a folder of images, a file, or all that a glob pattern matches (sorted), in order.

    Lines of .txt are texts. Rows of .jsonl, .csv and .parquet have ``text`` and/or ``image``, a
    path from the file's folder, and any ``id``; null and, beside another, an empty cell of .csv are
    not given. In .parquet, ``image`` may also be the bytes of a file, or as Hugging Face's datasets
    have it, a struct with ``bytes`` and ``path``. A row without an id has the number of the line on
    which it starts, from 1; an image of a folder its name; a pattern gives paths and path:number.
    As far as a pattern exists as it is written, brackets and all, it is no pattern.

    ``wanted`` says of each row in turn whether to read and check it; for others comes None.
    ``without_bytes`` takes it that rows of Parquet have an image if images there are bytes, and
    does not read them.

    Raises FileNotFoundError: no such file or folder; ValueError: one line naming file and line, and
    what is wrong with the file as a whole; what is wrong with one row is the ``error`` of its item.
    """
    if source.is_dir():
        for name in list_folder(source)[0]:
            yield _item(str(source), name, {"image": name}, source) if next(wanted) else None
    for file in _files(source):
        suffix = file.suffix.lower()
        if file != source and suffix not in SUFFIXES:
            if file.name.lower().endswith(IMAGE_SUFFIXES):
                name = str(file)
                yield _item(str(source), name, {"image": name}, Path()) if next(wanted) else None
            continue
        if not file.exists():
            raise FileNotFoundError(f"{file}: no such file or folder")
        if suffix not in SUFFIXES:
            raise ValueError(
                f"{file}: unknown suffix {file.suffix!r}, expected {', '.join(SUFFIXES)} or a "
                "folder of images"
            )
        if not file.is_file():  # a pipe would be waited for, and it is read twice
            raise ValueError(f"{file}: no file, but a folder, a pipe or the like")
        prefix = "" if file == source else f"{file}:"
        for number, values in read_rows(file, _check_columns, wanted, without_bytes=without_bytes):
            if suffix == ".csv" and isinstance(values, dict):
                for column, other in (("text", "image"), ("image", "text")):
                    if not values.get(column) and values.get(other):
                        values.pop(column, None)
            where, id = f"{file}:{number}", f"{prefix}{number}"
            yield None if values is None else _item(where, id, values, file.parent)


def _files(source: Path) -> list[Path]:
    """Give the file that ``source`` is, or what it matches; of a folder nothing."""
    if source.is_dir():
        return []
    if source.exists() or in_bucket(source) or not glob.has_magic(str(source)):
        return [source]
    folder = next(parent for parent in source.parents if parent.is_dir())
    pattern = str(source.relative_to(folder))
    return [folder / match for match in sorted(glob.glob(pattern, root_dir=folder, recursive=True))]


def list_folder(folder: Path) -> tuple[list[str], list[str]]:
    """Give the names of a folder's images and of its other entries, without hidden ones, sorted.

    Raises ValueError: there is no image, or the folder is in a bucket; OSError: it cannot be read.
    """
    if in_bucket(folder):
        raise ValueError(
            f"{folder}: in a bucket, expected one file of {', '.join(SUFFIXES)}; mount the bucket "
            "for folders of images and patterns"
        )
    names: dict[bool, list[str]] = {True: [], False: []}
    for name in sorted(os.listdir(folder)):
        if not name.startswith("."):
            is_image = name.lower().endswith(IMAGE_SUFFIXES) and os.path.isfile(folder / name)
            names[is_image].append(name)
    if not names[True]:
        raise ValueError(f"{folder}: no image file ({', '.join(IMAGE_SUFFIXES)})")
    return names[True], names[False]


def _item(where: str, id: str, values: dict[str, Any] | ValueError, folder: Path) -> Item:
    """Make an input of a row, checking all that needs no model: one may take minutes to load."""
    try:
        if isinstance(values, ValueError):
            raise values
        value = {key: _cell(key, cell) for key, cell in values.items() if cell is not None}
        found = value.pop("id", id)
        if not found.strip():
            raise ValueError("the id is empty")
        if not found.isascii() and _HALF.search(found):  # it could not be written
            own = "the id has half a character (a lone surrogate)"
            raise ValueError(f"the file's name is not UTF-8: rename {id!a}" if found is id else own)
        id = found
        if not value:
            raise ValueError("neither text nor image is given")
        text = value.get("text", "-")
        if not text.strip():
            raise ValueError("the text is empty")
        if not text.isascii() and (half := _HALF.search(text)):
            what = "expected valid Unicode"
            raise ValueError(f"the text contains the lone surrogate {half[0]!a}: {what}")
        if isinstance(value.get("image"), str):
            value["image"] = _image_path(value["image"], folder)
        return Item(where, id, value)
    except ValueError as error:
        return Item(where, id.encode(errors="backslashreplace").decode(), {}, str(error))


def _cell(key: str, value: object) -> Any:
    if key not in _COLUMNS:  # not ignored: a misspelt one would change the embedding
        raise ValueError(f"unknown key {key!r}, expected {', '.join(_COLUMNS)}")
    if key == "id" and type(value) is int:
        return str(value)
    if key == "image" and isinstance(value, dict) and set(value) == {"bytes", "path"}:
        # bytes that were not read are b"": their path stands for them in the fingerprint
        value = value["path"] if value["bytes"] is None else value["bytes"] or str(value).encode()
    if isinstance(value, str) or (key == "image" and isinstance(value, bytes)):
        return value
    raise ValueError(f"{key} is of type {type(value).__name__}, not a string")


def _image_path(image: str, folder: Path) -> Path:
    if not image.strip():
        raise ValueError("image is empty")
    name = image_name(image)
    if "://" in image:
        raise ValueError(f"image {name}: URLs are not fetched; download it and give its path")
    if in_bucket(folder):
        raise ValueError(
            f"image {name}: not read from a bucket by its path; mount the bucket, or put "
            "the bytes of images into parquet"
        )
    path = folder / image
    if not os.path.isfile(path):  # unlike Path.is_file, False for any odd string
        what = (
            "no file, but a folder, a pipe or the like" if os.path.exists(path) else "no such file"
        )
        raise ValueError(f"image {image_name(path)}: {what}")
    return path


def _check_columns(where: str, header: list[str]) -> list[str]:
    if "text" not in header and "image" not in header:
        raise ValueError(f"{where}: no column text or image; found {header}")
    for column in header:
        if column not in _COLUMNS:
            raise ValueError(
                f"{where}: unknown column {column!r}, expected {', '.join(_COLUMNS)}: rename or "
                "remove it"
            )
        if header.count(column) > 1:
            raise ValueError(f"{where}: column {column} is there twice")
    return header
