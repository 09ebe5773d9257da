"""Rows of .txt, .csv, .jsonl and .parquet files, one at a time, with the place of each."""

import csv
import json
import os
from collections.abc import Callable, Iterable, Iterator
from itertools import count, islice, repeat
from pathlib import Path
from typing import Any

SUFFIXES = (".txt", ".jsonl", ".csv", ".parquet")
EVERY_ROW = repeat(True)
# Gets the place and the names of the columns and returns those to read; raises ValueError.
CheckColumns = Callable[[str, list[str]], Iterable[str]]
# Its number, and its values by column, or what is wrong with it (without file and number), or None
# if it is not wanted.
Row = tuple[int, "dict[str, object] | ValueError | None"]


def read_rows(
    file: Path,
    check_columns: CheckColumns,
    wanted: Iterator[bool] = EVERY_ROW,
    *,
    strings_only: bool = False,
    without_bytes: bool = False,
) -> Iterator[Row]:
    """Read the rows in order, of a file of any size, as only a part of it is in memory.

    Numbers count from 1: for txt, csv and jsonl the line of the file on which the row starts (so
    the first row of a csv file is at line 2), for parquet the row. Blank lines are skipped, but for
    txt, where every line is a row with one column, ``text``.

    The suffix of the file, one of ``SUFFIXES``, tells the format. ``check_columns`` is asked for
    csv and parquet; of jsonl, each row has its own keys. ``wanted`` says of each row whether to
    parse it; a row group of a parquet file without such a row is not read. ``strings_only`` refuses
    columns of a parquet file that hold something else. ``without_bytes`` does not read its binary
    columns, nor binary fields of structs; their values are then ``b""``.

    Raises ValueError: one line naming the file, and the line if it has one: columns that
    ``check_columns`` refuses, text that is not UTF-8, broken csv or parquet.
    """
    suffix = file.suffix.lower()
    if suffix == ".parquet":
        yield from _read_parquet(file, check_columns, wanted, strings_only, without_bytes)
    elif suffix == ".csv":
        yield from _read_csv(file, check_columns, wanted)
    else:
        for number, line in _read_lines(file):
            if suffix == ".txt":
                text = line.removesuffix("\n").removesuffix("\r")
                yield number, {"text": text} if next(wanted) else None
            elif line.strip():
                yield number, _json_row(line) if next(wanted) else None


def _read_lines(file: Path) -> Iterator[tuple[int, str]]:
    """Number the lines, each with its end: a newline only, not all that str.splitlines knows."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                # spreadsheets put a BOM in front
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{file}:{number}: not UTF-8 (byte 0x{error.object[error.start]:02x}): save "
                    "the file as UTF-8"
                ) from None


def _read_csv(file: Path, check_columns: CheckColumns, wanted: Iterator[bool]) -> Iterator[Row]:
    # strict: otherwise a stray quote silently swallows or merges what follows it
    reader = csv.reader((line for _, line in _read_lines(file)), strict=True)
    header: list[str] | None = None
    number = 1
    try:
        for row in reader:
            start, number = number, reader.line_num + 1
            if not row:
                continue
            if header is None:
                header = row
                check_columns(f"{file}:{start}", header)
            elif not next(wanted):
                yield start, None
            elif len(row) != len(header):
                yield start, ValueError(f"{len(row)} fields, expected {len(header)}: {header}")
            else:
                yield start, dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise ValueError(f"{file}:{number}: broken csv: {error}") from None


def _json_object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    values: dict[str, object] = {}
    for key, value in pairs:
        if key in values:  # json itself would keep the last one
            raise KeyError(key)
        values[key] = value
    return values


JSON = json.JSONDecoder(object_pairs_hook=_json_object)
"""It decodes as json does, but raises KeyError where an object has a key twice."""


def _json_row(line: str) -> dict[str, object] | ValueError:
    try:
        row = JSON.decode(line.strip())
    except json.JSONDecodeError as error:
        return ValueError(f"broken json: {error.msg}, character {error.colno}")
    except KeyError as error:
        return ValueError(f"key {error.args[0]!r} is there twice")
    except (ValueError, RecursionError) as error:  # numbers too long, brackets too deep
        return ValueError(f"broken json: {error}")
    if isinstance(row, dict):
        return row
    return ValueError(f"found {shortened(row)}, expected an object")


def shortened(value: object) -> str:
    """Show a value as json of at most 40 characters, for messages."""
    try:
        text = json.dumps(value)
    except RecursionError:
        text = "brackets in brackets, too deep"
    return text if len(text) <= 40 else text[:37] + "..."


def _read_parquet(
    file: Path,
    check_columns: CheckColumns,
    wanted: Iterator[bool],
    strings_only: bool,
    without_bytes: bool,
) -> Iterator[Row]:
    # here and not above: the import takes a while and other formats do not need it
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # read_table would take columns from folder names; a buffer lets it read piece by piece
        with file.open("rb") as content, pq.ParquetFile(content, buffer_size=2**20) as table:
            columns = set(check_columns(str(file), table.schema_arrow.names))
            for field in table.schema_arrow if strings_only else ():
                kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
                is_string = pa.types.is_string(kind) or pa.types.is_large_string(kind)
                if field.name in columns and not is_string:
                    raise ValueError(
                        f"{file}: column {field.name} is of type {field.type}, expected string"
                    )
            paths: list[str] = []
            left_out: list[str] = []
            for leaf in map(table.schema.column, range(len(table.schema))):
                if leaf.path.partition(".")[0] in columns:
                    binary = "BYTE_ARRAY" in leaf.physical_type and leaf.logical_type.type == "NONE"
                    (left_out if without_bytes and binary else paths).append(leaf.path)
            whole, numbers = table.metadata, count(1)
            sizes = [whole.row_group(group).num_rows for group in range(whole.num_row_groups)]
            if min(sizes, default=0) < 0 or sum(sizes) != whole.num_rows:
                raise ValueError(f"{file}: broken parquet: its row groups do not add up")
            for group, size in enumerate(sizes):
                flags = bytes(islice(wanted, size))
                if not any(flags):
                    yield from zip(islice(numbers, len(flags)), repeat(None))
                    continue
                flag, left = iter(flags), size
                # few rows at a time, as they may hold images
                for batch in table.iter_batches(256, row_groups=[group], columns=paths):
                    chosen, left = bytes(islice(flag, len(batch))), left - len(batch)
                    rows = _batch_rows(batch, left_out) if any(chosen) else [None] * len(batch)
                    for is_chosen, row, number in zip(chosen, rows, numbers, strict=False):
                        yield number, row if is_chosen else None
                if left:  # Arrow believes a column that says so
                    raise ValueError(f"{file}: broken parquet: {size - left} rows, not {size}")
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the disk, not of Arrow
            raise
        raise ValueError(f"{file}: broken parquet: {str(error).splitlines()[0]}") from None


def _batch_rows(batch: Any, left_out: list[str]) -> list[dict[str, Any] | ValueError]:
    rows: list[dict[str, Any] | ValueError]
    try:
        rows = batch.to_pylist()
    except UnicodeDecodeError:  # Arrow does not check when it reads
        rows = [_checked_row(batch.slice(i, 1)) for i in range(len(batch))]
    for path in left_out:
        column, _, field = path.partition(".")
        for row in rows:
            if isinstance(row, ValueError):
                continue
            if not field:
                row[column] = b""
            elif row.setdefault(column, {}) is not None:
                row[column][field] = b""
    return rows


def _checked_row(batch: Any) -> dict[str, Any] | ValueError:
    row = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            row[name] = column[0].as_py()
        except UnicodeDecodeError as error:
            return ValueError(f"{name} is not UTF-8 (byte {error.start})")
    return row


def parquet_footer(file: Path) -> bytes:
    """Read the end of a Parquet file, which tells the sizes of its columns in every row group."""
    with file.open("rb") as content:
        content.seek(-8, os.SEEK_END)
        size = int.from_bytes(content.read(4), "little")
        content.seek(-8 - size, os.SEEK_END)
        return content.read(size)
