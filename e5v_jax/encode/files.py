"""Files of the encode command: inputs from text, jsonl or csv or an image folder; vectors out."""

import csv
import io
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
"""What a folder is searched for; an image named by path may have any suffix."""
OUTPUT_SUFFIXES = (".npy", ".parquet")
COLUMNS = ("id", "text", "image")


@dataclass(frozen=True)
class Item:
    """One input."""

    where: str
    """Where a person finds it, for messages: ``file:line`` or the flag."""
    id: str
    value: dict[str, str | Path]
    """``text`` and/or ``image``, as :meth:`e5v_jax.E5V.encode` takes it."""


def make_item(
    where: str, id: str, *, text: str | None, image: str | None, folder: Path = Path()
) -> Item:
    """An input whose ``image`` is a path relative to ``folder``.

    What needs no model is checked here: a model may take minutes to load.

    Raises:
        ValueError: neither text nor image, an empty one, a URL.
        FileNotFoundError: no such image.
    """
    value: dict[str, str | Path] = {}
    if text is not None:
        if not text.strip():
            raise ValueError(f"{where}: the text is empty")
        value["text"] = text
    if image is not None:
        if not image.strip():
            raise ValueError(f"{where}: image is empty")
        if "://" in image:
            raise ValueError(
                f"{where}: image {image}: URLs are not fetched; download it and give its path"
            )
        value["image"] = folder / image
        if not os.path.exists(folder / image):  # unlike Path.exists, False for any odd string
            raise FileNotFoundError(f"{where}: image {folder / image}: no such file")
    if not value:
        raise ValueError(f"{where}: neither text nor image is given")
    return Item(where, id, value)


def read_items(source: Path) -> tuple[list[Item], list[str]]:
    """Inputs of a folder of images or a file, in order, and the names of a folder's other entries.

    - .txt: one text a line.
    - .jsonl: an object a line with ``text`` and/or ``image`` and any ``id``; null is not given.
    - .csv: columns ``text`` and/or ``image`` and any ``id``; where there are both, an empty cell is
      not given.

    Image paths are relative to the file's folder. Lines count from 1, and the number of the line on
    which it starts is the id of a row that has none. In a folder, the file name is the id.

    Raises:
        FileNotFoundError: no such file, folder or image.
        ValueError: one line naming file and line, and what is wrong there.
    """
    if not source.exists():
        raise FileNotFoundError(f"{source}: no such file or folder")
    if source.is_dir():
        return _read_folder(source)
    reader = _READERS.get(source.suffix.lower())
    if reader is None:
        raise ValueError(
            f"{source}: unknown suffix {source.suffix!r}, expected {', '.join(_READERS)} or a "
            "folder of images"
        )
    lines: dict[str, str] = {}
    items = []
    for item in reader(source, _decode(source)):
        if item.id in lines:
            raise ValueError(f"{item.where}: id {item.id!r} is taken: see {lines[item.id]}")
        lines[item.id] = item.where
        items.append(item)
    if not items:
        raise ValueError(f"{source}: nothing to embed")
    return items, []


def _read_folder(folder: Path) -> tuple[list[Item], list[str]]:
    names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    items: list[Item] = []
    others: list[str] = []
    for name in names:
        if name.lower().endswith(IMAGE_SUFFIXES) and (folder / name).is_file():
            items.append(Item(str(folder), name, {"image": folder / name}))
        else:
            others.append(name)
    if not items:
        raise ValueError(f"{folder}: no image file ({', '.join(IMAGE_SUFFIXES)})")
    return items, others


def _decode(file: Path) -> str:
    data = file.read_bytes()
    try:
        return data.decode("utf-8-sig")  # spreadsheets put a BOM in front
    except UnicodeDecodeError as error:
        data = error.object  # without the BOM
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{file}:{line}: not UTF-8 (byte 0x{data[error.start]:02x}): save the file as UTF-8"
        ) from None


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Numbered lines; str.splitlines would also split at characters that may be in a text."""
    lines = text.removesuffix("\n").split("\n") if text else []
    return enumerate((line.removesuffix("\r") for line in lines), start=1)


def _read_txt(file: Path, content: str) -> Iterator[Item]:
    for number, line in _lines(content):
        yield make_item(f"{file}:{number}", str(number), text=line, image=None)


def _read_jsonl(file: Path, content: str) -> Iterator[Item]:
    for number, line in _lines(content):
        where = f"{file}:{number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: broken json: {error.msg}, column {error.colno}") from None
        except (ValueError, RecursionError) as error:  # numbers too long, brackets too deep
            raise ValueError(f"{where}: broken json: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f'{where}: expected an object, as {{"text": "a dog"}}')
        values = {"id": str(number)}
        for key, value in row.items():
            if key not in COLUMNS:
                raise ValueError(f"{where}: unknown key {key!r}, expected {', '.join(COLUMNS)}")
            if key == "id" and type(value) is int:
                value = str(value)
            if not isinstance(value, str | None):
                raise ValueError(f"{where}: {key} is of type {type(value).__name__}, not a string")
            if value is not None:
                values[key] = value
        yield _make_row(where, values, file.parent)


def _read_csv(file: Path, content: str) -> Iterator[Item]:
    # strict: otherwise a stray quote silently swallows what follows it
    reader = csv.reader(io.StringIO(content, newline=""), strict=True)
    header: list[str] | None = None
    while True:
        number = reader.line_num + 1
        where = f"{file}:{number}"
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise ValueError(f"{where}: broken csv: {error}") from None
        if row is None:
            return
        if not row:
            continue
        if header is None:
            header = row
            _check_header(where, header)
            continue
        if len(row) != len(header):
            raise ValueError(f"{where}: {len(row)} fields, expected {len(header)}: {header}")
        values = {"id": str(number), **dict(zip(header, row, strict=True))}
        for column, other in (("text", "image"), ("image", "text")):
            if not values.get(column) and values.get(other):
                values.pop(column, None)
        yield _make_row(where, values, file.parent)


def _check_header(where: str, header: list[str]) -> None:
    if "text" not in header and "image" not in header:
        raise ValueError(f"{where}: no column text or image; found {header}")
    for column in header:
        if column not in COLUMNS:  # not ignored: a misspelt one would change the embedding
            raise ValueError(
                f"{where}: unknown column {column!r}, expected {', '.join(COLUMNS)}: rename or "
                "remove it"
            )
        if header.count(column) > 1:
            raise ValueError(f"{where}: column {column} is there twice")


def _make_row(where: str, values: dict[str, str], folder: Path) -> Item:
    if not values["id"].strip():
        raise ValueError(f"{where}: the id is empty")
    return make_item(
        where, values["id"], text=values.get("text"), image=values.get("image"), folder=folder
    )


_READERS: dict[str, Callable[[Path, str], Iterator[Item]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
}


def check_output(path: Path) -> None:
    """Refuse an output that could not be written, before anything is computed.

    Raises:
        ValueError: a suffix other than .npy and .parquet.
        FileExistsError: it exists.
        FileNotFoundError: its folder does not.
        PermissionError: its folder cannot be written to.
    """
    if path.suffix not in OUTPUT_SUFFIXES:
        raise ValueError(f"{path}: expected a name that ends in {' or '.join(OUTPUT_SUFFIXES)}")
    if path.exists():
        raise FileExistsError(f"{path}: already exists; choose another name or delete it")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: no such folder; create it first")
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"{path.parent}: no permission to write there")


def write_vectors(path: Path, ids: list[str], vectors: np.ndarray) -> None:
    """Write fp32 vectors [N, D]; ``path`` appears only when whole.

    .npy holds the array, .parquet the columns ``id`` (string) and ``embedding`` (a list of D fp32).

    Raises:
        OSError: the disk is full or the like.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            if path.suffix == ".npy":
                np.save(file, vectors.astype(np.float32))
            else:
                _write_parquet(file, ids, vectors.astype(np.float32))
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_parquet(file: io.BufferedWriter, ids: list[str], vectors: np.ndarray) -> None:
    # here and not above: the import takes a while and .npy does not need it
    import pyarrow as pa
    import pyarrow.parquet as pq

    embeddings = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
    pq.write_table(pa.table({"id": pa.array(ids, pa.string()), "embedding": embeddings}), file)
