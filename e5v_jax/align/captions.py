"""Captioned images from folders and Parquet files."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from e5v_jax.data.rows import read_rows, shortened
from e5v_jax.evaluate.retrieval import load_captioned

COLUMNS = ("image", "captions")


@dataclass(frozen=True)
class Captions:
    """These are images, each with at least one caption."""

    images: list[Path | bytes]  # a file, or its content
    texts: list[list[str]]
    row_ids: list[str]  # where a person finds each
    fingerprint: str  # sha256 (hex) over file names (of Parquet, contents) and captions

    def __len__(self) -> int:
        return len(self.images)


def load_captions(paths: Sequence[Path], *, stride: int = 1) -> Captions:
    """Read folders and Parquet files in the given order; then take every ``stride``-th image.

    Raises FileNotFoundError, ValueError: one line naming file and row, and what is wrong.
    """
    if not paths:
        raise ValueError(
            "data.path: none given, expected folders with captions.jsonl or .parquet files"
        )
    rows: list[tuple[str, Path | bytes, str, list[str]]] = []
    for i, path in enumerate(paths):
        if path in paths[:i]:
            raise ValueError(f"{path}: given twice")
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder")
        if path.is_dir():
            rows += _read_folder(path)
        elif path.suffix.lower() == ".parquet":
            rows += _read_parquet(path)
        else:
            raise ValueError(f"{path}: expected a folder with captions.jsonl, or a .parquet file")
    rows = rows[::stride]
    digest = hashlib.sha256(json.dumps([(name, texts) for _, _, name, texts in rows]).encode())
    row_ids, images, _, texts = (list(column) for column in zip(*rows, strict=True))
    return Captions(images, texts, row_ids, digest.hexdigest())


def _read_folder(folder: Path) -> Iterator[tuple[str, Path, str, list[str]]]:
    """Yield (where, file, its name in the folder, captions)."""
    found = load_captioned(folder)
    for image, texts in zip(found.images, found.captions, strict=True):
        assert isinstance(image, Path)
        name = image.relative_to(folder).as_posix()
        yield f"{folder / 'captions.jsonl'}: {name}", image, name, texts


def _read_parquet(file: Path) -> Iterator[tuple[str, bytes, str, list[str]]]:
    """Yield (where, content of the image, its sha256, captions)."""
    before = 0
    for number, row in read_rows(file, _check_columns):
        where = f"{file}:{number}"
        assert row is not None  # all rows are wanted
        if isinstance(row, ValueError):
            raise ValueError(f"{where}: {row}")
        image, texts = (row[name] for name in COLUMNS)
        if isinstance(image, dict):  # as the hub's data sets have it
            image = image.get("bytes")
        if not isinstance(image, bytes) or not image:
            kind = "null" if image is None else "empty" if image == b"" else type(image).__name__
            raise ValueError(f"{where}: column image is {kind}, expected an encoded image (bytes)")
        texts = [texts] if isinstance(texts, str) else texts
        if not isinstance(texts, list) or not texts:
            raise ValueError(
                f"{where}: column captions is {shortened(texts)}, expected texts, at least one"
            )
        for text in texts:
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"{where}: a caption is {shortened(text)}, expected a text")
        yield where, image, hashlib.sha256(image).hexdigest(), texts
        before += 1
    if not before:
        raise ValueError(f"{file}: no rows")


def _check_columns(where: str, names: Iterable[str]) -> tuple[str, ...]:
    found = list(names)
    for name in COLUMNS:
        if name not in found:
            raise ValueError(f"{where}: no column {name}; found {found}")
    return COLUMNS
