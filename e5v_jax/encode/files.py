"""Inputs of the encode command: rows of text, jsonl, csv and parquet files, folders of images."""

import glob
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from e5v_jax.data.rows import SUFFIXES, read_rows
from e5v_jax.storage import in_bucket

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
"""What a folder is searched for; an image named by path may have any suffix."""
COLUMNS = ("id", "text", "image")


@dataclass(frozen=True)
class Item:
    """One input."""

    where: str
    """Where a person finds it, for messages: ``file:line`` or the flag."""
    id: str
    value: dict[str, str | Path | bytes]
    """``text`` and/or ``image``, as :meth:`e5v_jax.E5V.encode` takes it."""
    error: str | None = None
    """Why it cannot be embedded, if that is known without a model; then it has no value."""


@dataclass(frozen=True)
class Scan:
    """What there is to embed, read once without keeping it."""

    rows: int
    fingerprint: str
    """sha256 (hex) over ids, texts, image paths and the sizes of images given as bytes."""


def make_item(
    where: str, id: str, *, text: str | None, image: str | None, folder: Path = Path()
) -> Item:
    """An input whose ``image`` is a path relative to ``folder``.

    What needs no model is checked here: a model may take minutes to load.

    Raises:
        ValueError: neither text nor image, an empty one, a URL, no such image.
    """
    try:
        return Item(where, id, _value(text, image, folder))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _value(
    text: str | None, image: str | bytes | None, folder: Path
) -> dict[str, str | Path | bytes]:
    value: dict[str, str | Path | bytes] = {}
    if text is not None:
        if not text.strip():
            raise ValueError("the text is empty")
        value["text"] = text
    if isinstance(image, bytes):
        value["image"] = image
    elif image is not None:
        if not image.strip():
            raise ValueError("image is empty")
        if "://" in image:
            raise ValueError(f"image {image}: URLs are not fetched; download it and give its path")
        if in_bucket(folder):
            raise ValueError(
                f"image {image}: not read from a bucket by its path; mount the bucket, or put "
                "the bytes of images into parquet"
            )
        value["image"] = folder / image
        if not os.path.exists(folder / image):  # unlike Path.exists, False for any odd string
            raise ValueError(f"image {folder / image}: no such file")
    if not value:
        raise ValueError("neither text nor image is given")
    return value


def read_items(source: Path) -> tuple[list[Item], list[str]]:
    """All inputs of ``source`` in memory, and the names of a folder's other entries.

    Raises:
        FileNotFoundError, ValueError: as :func:`iterate_items`, and for a bad row too.
    """
    items = []
    for item in iterate_items(source):
        if item.error is not None:
            raise ValueError(f"{item.where}: {item.error}")
        items.append(item)
    return items, list_folder(source)[1] if source.is_dir() else []


def scan_items(source: Path, *, allow_errors: bool) -> Scan:
    """Read all inputs once; with ``allow_errors`` bad rows count as rows.

    Raises:
        FileNotFoundError, ValueError: as :func:`iterate_items`, and without ``allow_errors`` for a
            bad row too.
    """
    digest, rows = hashlib.sha256(), 0
    for item in iterate_items(source):
        if item.error is not None and not allow_errors:
            raise ValueError(f"{item.where}: {item.error}")
        image = item.value.get("image")
        parts = (item.id, item.value.get("text"), len(image) if isinstance(image, bytes) else image)
        digest.update(repr(tuple(map(str, parts))).encode("utf-8", "surrogatepass"))
        rows += 1
    return Scan(rows, digest.hexdigest())


def iterate_items(source: Path) -> Iterator[Item]:
    """Inputs of a folder of images, of a file, or of all that a glob pattern matches, in order.

    - .txt: one text a line.
    - .jsonl: an object a line with ``text`` and/or ``image`` and any ``id``; null is not given.
    - .csv: columns ``text`` and/or ``image`` and any ``id``; where there are both, an empty cell is
      not given.
    - .parquet: columns as for .csv; ``image`` may also be the bytes of a file, or as Hugging Face's
      datasets have it, a struct with ``bytes`` and ``path``.

    Image paths are relative to the file's folder. Lines count from 1, and the number of the line on
    which it starts is the id of a row that has none. In a folder, the file name is the id. What a
    pattern (say ``photos/**/*.jpg``) matches is sorted; ids are paths, of rows path:number.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: one line naming file and line, and what is wrong there with the file as a whole;
            what is wrong with one row only is the ``error`` of its item.
    """
    places: dict[str, str] = {}
    for item in _iterate(source):
        if item.id in places:
            reason = f"id {item.id!r} is taken: see {places[item.id]}"
            yield Item(item.where, item.id, {}, item.error or reason)
        else:
            places[item.id] = item.where
            yield item
    if not places:
        raise ValueError(f"{source}: nothing to embed")


def _iterate(source: Path) -> Iterator[Item]:
    if source.is_dir():
        for name in list_folder(source)[0]:
            yield Item(str(source), name, {"image": source / name})
    elif source.exists() or in_bucket(source) or not glob.has_magic(str(source)):
        yield from _iterate_file(source, prefix="")
    else:
        for match in map(Path, sorted(glob.glob(str(source), recursive=True))):
            if match.suffix.lower() in SUFFIXES:
                yield from _iterate_file(match, prefix=f"{match}:")
            elif match.name.lower().endswith(IMAGE_SUFFIXES):
                yield Item(str(source), str(match), {"image": match})


def list_folder(folder: Path) -> tuple[list[str], list[str]]:
    """Names of a folder's images and of its other entries, hidden ones left out, sorted.

    Raises:
        ValueError: there is no image, or the folder is in a bucket.
    """
    if in_bucket(folder):
        raise ValueError(
            f"{folder}: in a bucket, expected one file of {', '.join(SUFFIXES)}; mount the bucket "
            "for folders of images and patterns"
        )
    images: list[str] = []
    others: list[str] = []
    for name in sorted(entry.name for entry in folder.iterdir()):
        if not name.startswith("."):
            is_image = name.lower().endswith(IMAGE_SUFFIXES) and (folder / name).is_file()
            (images if is_image else others).append(name)
    if not images:
        raise ValueError(f"{folder}: no image file ({', '.join(IMAGE_SUFFIXES)})")
    return images, others


def _iterate_file(file: Path, *, prefix: str) -> Iterator[Item]:
    if not file.exists():
        raise FileNotFoundError(f"{file}: no such file or folder")
    suffix = file.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(
            f"{file}: unknown suffix {file.suffix!r}, expected {', '.join(SUFFIXES)} or a "
            "folder of images"
        )
    for number, values in read_rows(file, _check_columns):
        assert values is not None  # all rows are wanted
        if suffix == ".csv" and isinstance(values, dict):
            for column, other in (("text", "image"), ("image", "text")):
                if not values.get(column) and values.get(other):
                    values.pop(column, None)
        yield _item(file, number, values, prefix)


def _item(file: Path, number: int, values: dict[str, object] | ValueError, prefix: str) -> Item:
    where, id = f"{file}:{number}", f"{prefix}{number}"
    try:
        if isinstance(values, ValueError):
            raise values
        given = {key: _cell(key, value) for key, value in values.items() if value is not None}
        found = given.get("id", id)
        assert isinstance(found, str)
        if not found.strip():
            raise ValueError("the id is empty")
        id = found
        text = given.get("text")
        assert text is None or isinstance(text, str)
        return Item(where, id, _value(text, given.get("image"), file.parent))
    except ValueError as error:
        return Item(where, id, {}, str(error))


def _cell(key: str, value: object) -> str | bytes:
    if key not in COLUMNS:  # not ignored: a misspelt one would change the embedding
        raise ValueError(f"unknown key {key!r}, expected {', '.join(COLUMNS)}")
    if key == "id" and type(value) is int:
        return str(value)
    if key == "image" and isinstance(value, dict) and set(value) == {"bytes", "path"}:
        value = value["path"] if value["bytes"] is None else value["bytes"]
    if isinstance(value, str) or (key == "image" and isinstance(value, bytes)):
        return value
    raise ValueError(f"{key} is of type {type(value).__name__}, not a string")


def _check_columns(where: str, header: list[str]) -> list[str]:
    if "text" not in header and "image" not in header:
        raise ValueError(f"{where}: no column text or image; found {header}")
    for column in header:
        if column not in COLUMNS:
            raise ValueError(
                f"{where}: unknown column {column!r}, expected {', '.join(COLUMNS)}: rename or "
                "remove it"
            )
        if header.count(column) > 1:
            raise ValueError(f"{where}: column {column} is there twice")
    return header
