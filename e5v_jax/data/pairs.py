"""Training pairs from files: columns sent0, sent1, hard_neg, and image0, image1, hard_neg_image."""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from e5v_jax.data.rows import read_rows, shortened
from e5v_jax.storage import in_bucket

# The sides of the loss and the columns that fill them: texts, images, or both in each row.
SIDES = {
    "anchor": ("sent0", "image0"),
    "positive": ("sent1", "image1"),
    "hard negative": ("hard_neg", "hard_neg_image"),
}
_COLUMNS = tuple(column for columns in SIDES.values() for column in columns)
_IMAGE_COLUMNS = tuple(image for _, image in SIDES.values())
_SUFFIXES = (".csv", ".jsonl", ".parquet")


@dataclass(frozen=True)
class Side:
    """All anchors, positives or hard negatives: texts, images, or both in all rows."""

    column: str  # to name in messages
    texts: list[str] | None
    images: list[Path] | None

    def __len__(self) -> int:
        return len(self.texts if self.texts is not None else self.images or ())


@dataclass(frozen=True)
class TrainingPairs:
    """Training rows: anchors, positives and, for all rows or none, hard negatives."""

    sides: tuple[Side, ...]
    row_ids: list[str]  # "file:row", where a person finds the row: see load_pairs
    fingerprint: str  # sha256 (hex) over the columns; the same in any file format and folder

    def __len__(self) -> int:
        return len(self.row_ids)


def load_pairs(path: Path | Sequence[Path]) -> TrainingPairs:
    """Read training rows from .csv, .jsonl or .parquet files, concatenated in the given order.

    Columns are those of SimCSE's nli_for_simcse.csv: ``sent0``, ``sent1`` and, for triplets,
    ``hard_neg``, in any order; beside a ``hard_neg`` other columns are passed over. In place of a
    sentence or beside it there may be an image: ``image0``, ``image1``, ``hard_neg_image``, its
    path as seen from the file's folder. All rows have the same columns. Sentences are kept as they
    are, spaces included. Rows are numbered in ``row_ids`` and errors as
    :func:`e5v_jax.data.rows.read_rows` does.

    Raises FileNotFoundError, ValueError: one line naming file, row and column, and what is wrong.
    """
    paths = list(path) if isinstance(path, Sequence) else [path]
    if not paths:
        raise ValueError("no training file given: expected .csv, .jsonl or .parquet files")
    columns: dict[str, list[Any]] = {}
    row_ids: list[str] = []
    for i, file in enumerate(paths):
        if file in paths[:i]:
            raise ValueError(f"{file}: given twice; its rows would be each other's negatives")
        if file.suffix.lower() not in _SUFFIXES:
            expected = ", ".join(_SUFFIXES)
            raise ValueError(f"{file}: unknown suffix {file.suffix!r}, expected {expected}")
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file")
        before = len(row_ids)
        for number, values in read_rows(file, _ordered, strings_only=True):
            where = f"{file}:{number}"
            assert values is not None  # all rows are wanted
            if isinstance(values, ValueError):
                raise ValueError(f"{where}: {values}")
            names = _ordered(where, values)
            if row_ids and names != tuple(columns):
                only = next(c for c in _COLUMNS if (c in names) != (c in columns))
                has, has_not = (where, row_ids[0]) if only in names else (row_ids[0], where)
                raise ValueError(
                    f"{where}: {has} has a {only} and {has_not} has none: "
                    "train on rows that all have the same columns"
                )
            for name in names:
                columns.setdefault(name, []).append(_value(where, name, values[name], file))
            row_ids.append(where)
        if len(row_ids) == before:
            raise ValueError(f"{file}: no rows")
    return make_pairs(columns, row_ids)


def make_pairs(columns: dict[str, list[Any]], row_ids: list[str]) -> TrainingPairs:
    """Put columns of texts (str) and images (Path) together; named and in order as in ``SIDES``."""
    for_hash: Any = list(columns.values())
    if any(name in _IMAGE_COLUMNS for name in columns):  # the names tell which are images
        for_hash = [[name, [str(x) for x in column]] for name, column in columns.items()]
    return TrainingPairs(
        sides=tuple(
            Side(image if image in columns else text, columns.get(text), columns.get(image))
            for text, image in SIDES.values()
            if text in columns or image in columns
        ),
        row_ids=row_ids,
        fingerprint=hashlib.sha256(json.dumps(for_hash).encode()).hexdigest(),
    )


def _ordered(where: str, names: Iterable[str]) -> tuple[str, ...]:
    """The columns to read, in order; others are passed over where there are hard negatives."""
    found = list(names)
    columns = tuple(column for column in _COLUMNS if column in found)
    for side, (text, image) in SIDES.items():
        if side != "hard negative" and text not in columns and image not in columns:
            raise ValueError(f"{where}: no column {text}; found {found}")
    unknown = [name for name in found if name not in columns]
    if unknown and not set(SIDES["hard negative"]) & set(columns):
        # a misspelt hard_neg would train without hard negatives
        raise ValueError(
            f"{where}: unknown column {unknown[0]!r} and no hard_neg: rename or remove it; "
            "expected sent0, sent1 and, if any, hard_neg"
        )
    if len(found) != len(set(found)):
        raise ValueError(f"{where}: a column is there twice; found {found}")
    return columns


def _value(where: str, column: str, value: object, file: Path) -> str | Path:
    if not isinstance(value, str):
        raise ValueError(f"{where}: {column} is {shortened(value)}, expected a string")
    if not value.strip():
        raise ValueError(f"{where}: {column} is empty")
    if half := re.search("[\ud800-\udfff]", value):  # json can say "\ud800"
        place = half.start()
        raise ValueError(f"{where}: {column} has half a character (lone surrogate) at {place}")
    if column not in _IMAGE_COLUMNS:
        return value
    if in_bucket(file):
        raise ValueError(f"{where}: {column}: images are not read from a bucket: mount it")
    return file.parent / value
