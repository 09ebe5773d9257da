"""Sources of training pairs: files with columns sent0, sent1, hard_neg, and NLI corpora of tfds."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from e5v_jax.data.rows import read_rows

REQUIRED = ("sent0", "sent1")
HARD_NEG = "hard_neg"
_SUFFIXES = (".csv", ".jsonl", ".parquet")


@dataclass(frozen=True)
class Triplets:
    """Training rows: an anchor, its positive and, for all rows or none, a hard negative."""

    sent0: list[str]
    sent1: list[str]
    hard_neg: list[str] | None
    """None for plain pairs."""
    row_ids: list[str]
    """``file:row``, where a person finds the row: see :func:`load_triplets`."""
    fingerprint: str
    """sha256 (hex) over the sentences in order; the same in any file format and folder."""

    def __len__(self) -> int:
        return len(self.sent0)


# One row of a file: where it is ("file:row") and its values by column.
_Row = tuple[str, dict[str, object]]


def load_triplets(path: Path | Sequence[Path]) -> Triplets:
    """Read training rows from .csv, .jsonl or .parquet files, concatenated in the given order.

    Columns are those of SimCSE's nli_for_simcse.csv: ``sent0``, ``sent1`` and, for triplets,
    ``hard_neg``, in any order; beside a ``hard_neg`` other columns are passed over. Sentences are
    kept as they are, spaces included. The row in ``row_ids`` and in errors counts from 1: for csv
    and jsonl it is the line of the file on which the row starts (so the first row of a csv file is
    at line 2), for parquet the row. Blank lines are skipped.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: one line naming file, row and column: an unknown suffix, a missing or repeated
            column, an unknown one without a hard_neg, a value that is no string or is blank, text
            that is not UTF-8, broken csv, json or parquet, no rows, a file given twice, or
            ``hard_neg`` in some files only.
    """
    paths = [path] if isinstance(path, Path) else list(path)
    if not paths:
        raise ValueError("no training file given: expected .csv, .jsonl or .parquet files")
    rows: list[tuple[str, ...]] = []
    row_ids: list[str] = []
    for i, file in enumerate(paths):
        if file in paths[:i]:
            raise ValueError(f"{file}: given twice; its rows would be each other's negatives")
        before = len(rows)
        for where, values in _read(file):
            columns = _ordered(where, values.keys())
            row = tuple(_sentence(where, column, values[column]) for column in columns)
            if rows and len(row) != len(rows[0]):
                has, has_not = (where, row_ids[0]) if len(row) == 3 else (row_ids[0], where)
                raise ValueError(
                    f"{where}: {has} has a {HARD_NEG} and {has_not} has none: "
                    "train on triplets or on pairs, not on both"
                )
            rows.append(row)
            row_ids.append(where)
        if len(rows) == before:
            raise ValueError(f"{file}: no rows")
    return _triplets(rows, row_ids)


def _triplets(rows: Sequence[tuple[str, ...]], row_ids: list[str]) -> Triplets:
    columns = [list(column) for column in zip(*rows, strict=True)]
    return Triplets(
        sent0=columns[0],
        sent1=columns[1],
        hard_neg=columns[2] if len(columns) == 3 else None,
        row_ids=row_ids,
        fingerprint=hashlib.sha256(json.dumps(columns).encode()).hexdigest(),
    )


def _ordered(where: str, names: Iterable[str]) -> tuple[str, ...]:
    """The columns to read, in order; others are passed over where ``hard_neg`` is among them."""
    found = list(names)
    columns = (*REQUIRED, HARD_NEG) if HARD_NEG in found else REQUIRED
    repeated = len(found) != len(set(found))
    missing = [name for name in columns if name not in found]
    if missing:
        raise ValueError(f"{where}: no column {missing[0]}; found {found}")
    unknown = [name for name in found if name not in columns]
    if unknown and columns == REQUIRED:  # a misspelt hard_neg would train without hard negatives
        raise ValueError(
            f"{where}: unknown column {unknown[0]!r} and no hard_neg: rename or remove it; "
            "expected sent0, sent1 and, if any, hard_neg"
        )
    if repeated:
        raise ValueError(f"{where}: a column is there twice; found {found}")
    return columns


def _sentence(where: str, column: str, value: object) -> str:
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{where}: {column} is not UTF-8 (byte {error.start})") from None
    if not isinstance(value, str):
        raise ValueError(f"{where}: {column} is {_short(value)}, expected a string")
    if not value.strip():
        raise ValueError(f"{where}: {column} is empty")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:  # json can say "\ud800"
            raise ValueError(
                f"{where}: {column} has half a character (lone surrogate) at {error.start}"
            ) from None
    return value


def _read(file: Path) -> Iterator[_Row]:
    if file.suffix.lower() not in _SUFFIXES:
        raise ValueError(f"{file}: unknown suffix {file.suffix!r}, expected {', '.join(_SUFFIXES)}")
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    if file.suffix.lower() == ".parquet":
        yield from _read_parquet(file)
        return
    for number, values in read_rows(file, _ordered):
        where = f"{file}:{number}"
        if isinstance(values, ValueError):
            raise ValueError(f"{where}: {values}")
        _ordered(where, values.keys())
        yield where, values


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _read_parquet(file: Path) -> Iterator[_Row]:
    try:
        table = pq.ParquetFile(file).read()  # read_table would take columns from folder names
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file}: broken parquet: {str(error).splitlines()[0]}") from None
    _ordered(str(file), table.column_names)
    columns = []
    for name in table.column_names:
        kind = table.schema.field(name).type
        text = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not (pa.types.is_string(text) or pa.types.is_large_string(text)):
            raise ValueError(f"{file}: column {name} is of type {kind}, expected string")
        # as bytes, so that bad UTF-8 is found where the row is known
        columns.append(table[name].cast(pa.large_string()).cast(pa.large_binary()).to_pylist())
    for number, values in enumerate(zip(*columns, strict=True), start=1):
        yield f"{file}:{number}", dict(zip(table.column_names, values, strict=True))


NLI_LABELS = ("entailment", "neutral", "contradiction")
UNLABELLED = "-"
"""SNLI's and MultiNLI's mark for a pair whose annotators did not agree."""


def triplets_from_nli(rows: Iterable[tuple[str, str, str]], source: str) -> Triplets:
    """Turn (premise, hypothesis, label) rows into triplets, one per premise, after SimCSE.

    For each premise that has both, sent1 is its first entailment and hard_neg its first
    contradiction; rows of one premise need not be neighbours. SimCSE does not publish the script:
    one triplet per premise is our reading of its 275,601 rows for the 314 k entailments of SNLI
    and MultiNLI. Blank sentences and rows labelled ``-`` are left out.

    Args:
        rows: label is one of ``NLI_LABELS`` or ``-``.
        source: stands before the row number (from 1, that of the entailment) in ``row_ids``.

    Raises:
        ValueError: an unknown label, or not one premise has both.
    """
    entailments: dict[str, tuple[int, str]] = {}
    contradictions: dict[str, str] = {}
    for number, (premise, hypothesis, label) in enumerate(rows, start=1):
        if label not in NLI_LABELS and label != UNLABELLED:
            raise ValueError(
                f"{source}:{number}: label {label!r}, expected one of {(*NLI_LABELS, UNLABELLED)}"
            )
        if not premise.strip() or not hypothesis.strip():
            continue
        if label == "entailment":
            entailments.setdefault(premise, (number, hypothesis))
        elif label == "contradiction":
            contradictions.setdefault(premise, hypothesis)
    premises = [premise for premise in entailments if premise in contradictions]
    if not premises:
        raise ValueError(f"{source}: no premise has both an entailment and a contradiction")
    return _triplets(
        [(p, entailments[p][1], contradictions[p]) for p in premises],
        [f"{source}:{entailments[p][0]}" for p in premises],
    )


def load_tfds(
    name: Literal["snli", "multi_nli"], split: str = "train", data_dir: Path | None = None
) -> Triplets:
    """Triplets of a prepared tensorflow-datasets NLI corpus, read without TensorFlow.

    Args:
        name: the corpus; its newest prepared version is read.
        split: as in tfds, say ``train`` or ``validation[:10%]``. multi_nli calls its validation
            splits validation_matched and validation_mismatched.
        data_dir: where it was prepared; None is the environment variable ``TFDS_DATA_DIR``, else
            ``~/tensorflow_datasets``, as in tfds.

    Raises:
        FileNotFoundError: it is not prepared there; the message has the command that does it.
        ValueError: it is prepared in a format that only TensorFlow reads; an unknown split.
    """
    root = data_dir or Path(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets"))
    root = root.expanduser()
    folders = [info.parent for info in (root / name).glob("*/dataset_info.json")]
    versions = {  # by (major, minor, patch); tfds's own "incomplete.*" is none
        tuple(map(int, folder.name.split("."))): folder
        for folder in folders
        if folder.name.replace(".", "").isdecimal()
    }
    if not versions:
        raise FileNotFoundError(f"{root / name}: not prepared; {_how_to_prepare(name, root)}")
    folder = versions[max(versions)]

    # here and not above: the import takes a second and only this source needs it
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(folder)  # unlike tfds.builder, works from files alone
    try:
        records = builder.as_data_source(split=split)
    except NotImplementedError:
        raise ValueError(
            f"{folder}: prepared in a format that only TensorFlow reads; delete it or choose "
            f"another data_dir, then {_how_to_prepare(name, root)}"
        ) from None
    except ValueError:
        splits = ", ".join(sorted(builder.info.splits))
        raise ValueError(f"{folder}: no split {split!r}; found {splits}") from None
    labels = builder.info.features["label"].names
    rows = (
        (
            record["premise"].decode(),
            record["hypothesis"].decode(),
            UNLABELLED if record["label"] < 0 else labels[record["label"]],
        )
        for record in _in_blocks(records)
    )
    return triplets_from_nli(rows, source=f"{name}/{folder.name}/{split}")


def _in_blocks(records: Any) -> Iterator[dict[str, Any]]:
    for start in range(0, len(records), 4096):  # one at a time takes 2.5 times as long
        yield from records.__getitems__(list(range(start, min(start + 4096, len(records)))))


def _how_to_prepare(name: str, root: Path) -> str:
    # tfds 4.9.10 prepares with importlib_resources but does not install it; the code that prepares
    # multi_nli reads its files with TensorFlow.
    needs = "tensorflow importlib_resources" if name == "multi_nli" else "importlib_resources"
    return (
        "run once, in any environment with tensorflow-datasets and a network: "
        f'pip install {needs} && python -c "import tensorflow_datasets as tfds; '
        f"tfds.builder('{name}', data_dir='{root}', file_format='array_record')"
        '.download_and_prepare()"'
    )
