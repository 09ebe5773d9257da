"""Rows of .csv, .jsonl and .parquet files, one at a time, with the place of each for messages."""

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path

CheckColumns = Callable[[str, list[str]], object]
"""Gets where the columns are named and their names; raises ValueError if they do not serve."""
Row = tuple[int, "dict[str, object] | ValueError"]
"""Its number, and its values by column or what is wrong with it (without file and number)."""


def read_rows(file: Path, check_columns: CheckColumns) -> Iterator[Row]:
    """Rows in order; a file of any size, as only a part of it is in memory.

    Numbers count from 1: for csv and jsonl the line of the file on which the row starts (so the
    first row of a csv file is at line 2), for parquet the row. Blank lines are skipped.

    Args:
        file: its suffix tells the format.
        check_columns: for csv and parquet; of jsonl, each row has its own keys.

    Raises:
        ValueError: one line naming the file, and the line if it has one: an unknown suffix, columns
            that ``check_columns`` refuses, text that is not UTF-8, broken csv or parquet.
    """
    reader = _READERS.get(file.suffix.lower())
    if reader is None:
        raise ValueError(f"{file}: unknown suffix {file.suffix!r}, expected {', '.join(_READERS)}")
    return reader(file, check_columns)


def read_lines(file: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines, each with its end; only newlines end one, not all that str.splitlines knows.

    Raises:
        ValueError: a line that is not UTF-8.
    """
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


def _read_csv(file: Path, check_columns: CheckColumns) -> Iterator[Row]:
    # strict: otherwise a stray quote silently swallows or merges what follows it
    reader = csv.reader((line for _, line in read_lines(file)), strict=True)
    header: list[str] | None = None
    while True:
        number = reader.line_num + 1
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise ValueError(f"{file}:{number}: broken csv: {error}") from None
        if row is None:
            return
        if not row:
            continue
        if header is None:
            header = row
            check_columns(f"{file}:{number}", header)
        elif len(row) != len(header):
            yield number, ValueError(f"{len(row)} fields, expected {len(header)}: {header}")
        else:
            yield number, dict(zip(header, row, strict=True))


def _read_jsonl(file: Path, check_columns: CheckColumns) -> Iterator[Row]:
    for number, line in read_lines(file):
        if not line.strip():
            continue
        try:
            row = json.loads(line.strip(), object_pairs_hook=_json_object)
        except json.JSONDecodeError as error:
            yield number, ValueError(f"broken json: {error.msg}, character {error.colno}")
        except _RepeatedKey as error:
            yield number, error
        except (ValueError, RecursionError) as error:  # numbers too long, brackets too deep
            yield number, ValueError(f"broken json: {error}")
        else:
            if isinstance(row, dict):
                yield number, row
            else:
                text = json.dumps(row)
                found = text if len(text) <= 40 else text[:37] + "..."
                yield number, ValueError(f"found {found}, expected an object")


class _RepeatedKey(ValueError):
    pass


def _json_object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    values: dict[str, object] = {}
    for key, value in pairs:
        if key in values:  # json itself would keep the last one
            raise _RepeatedKey(f"key {key!r} is there twice")
        values[key] = value
    return values


def _read_parquet(file: Path, check_columns: CheckColumns) -> Iterator[Row]:
    # here and not above: the import takes a while and other formats do not need it
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # read_table would take columns from folder names
        with file.open("rb") as content, pq.ParquetFile(content) as table:
            check_columns(str(file), table.schema_arrow.names)
            number = 0
            for batch in table.iter_batches(batch_size=256):  # rows may hold images
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{file}: broken parquet: {str(error).splitlines()[0]}") from None


_READERS: dict[str, Callable[[Path, CheckColumns], Iterator[Row]]] = {
    ".csv": _read_csv,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
