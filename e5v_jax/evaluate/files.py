"""Reading benchmark files: images named by path or Parquet row, JSON, the authors' data sets."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from e5v_jax.data.rows import JSON
from e5v_jax.prompts import TextError

CheckText = Callable[[str], None]  # raises TextError on a text that the model does not take
HUB = Path("hub")  # --data hub: the authors' data sets from the Hugging Face hub
_HUB_OWNER = "royokong"


@dataclass(frozen=True)
class ParquetImage:
    """This is an encoded image in a Parquet file, read when it is needed."""

    file: Path
    column: str
    group: int
    row: int  # counts from the start of the row group

    def __str__(self) -> str:
        return f"{self.file}, row group {self.group}, row {self.row}"


ImageRef = Path | ParquetImage


def any_text(text: str) -> None:
    """Check nothing: a :data:`CheckText` for data that is only looked at."""


def as_input(image: ImageRef) -> Path | bytes:
    """Turn an image reference into an input for ``E5V.encode``."""
    if isinstance(image, Path):
        return image
    return _image_column(image.file, image.column, image.group)[image.row]


@lru_cache(maxsize=1)
def _image_column(file: Path, column: str, group: int) -> list[bytes]:
    import pyarrow.parquet as pq

    cells = pq.ParquetFile(file).read_row_group(group, columns=[column])[column].to_pylist()
    found = [cell and cell.get("bytes") for cell in cells]
    for row, content in enumerate(found):
        if not content:
            raise ValueError(f"{file}, row group {group}, row {row}: column {column} has no bytes")
    return found


def read_parquet(
    folder: Path, columns: Sequence[str], images: Sequence[str], *, split: str
) -> Iterator[dict[str, Any]]:
    """Read the rows of a data set as the hub has it: ``split*.parquet``, anywhere below ``folder``.

    ``columns`` are read, ``images`` (structs with ``bytes``) become :class:`ParquetImage`.
    Raises FileNotFoundError: no file; ValueError: a file is damaged or lacks a column.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    needed, pattern = [*columns, *images], f"{split}*.parquet"
    files = sorted(file for file in folder.rglob(pattern) if file.is_file())
    if not files:
        raise FileNotFoundError(f"{folder}: no file {pattern} in it, see docs/evaluation.md")
    for file in files:
        try:
            parquet = pq.ParquetFile(file)
            names = parquet.schema_arrow.names
            for name in needed:
                if name not in names:
                    found = f"found {', '.join(names)}, expected {', '.join(needed)}"
                    raise ValueError(f"{file}: no column {name}; {found}")
            for name in images:
                kind = parquet.schema_arrow.field(name).type
                if not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
                    raise ValueError(f"{file}: column {name} is {kind}, expected struct<bytes>")
            for group in range(parquet.num_row_groups):
                rows = parquet.read_row_group(group, columns=list(columns)).to_pylist()
                for number, row in enumerate(rows):
                    yield row | {name: ParquetImage(file, name, group, number) for name in images}
        except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{file}: not a whole Parquet file ({reason})") from error


def read_lines(path: Path, *, hint: str) -> list[str]:
    """Return the lines of a text file, without their ends.

    Raises FileNotFoundError: ``hint`` says what should be there; ValueError: a row is not UTF-8.
    """
    text = _read(path, hint)
    # Not splitlines(): it also splits at characters that may stand in a sentence, such as U+0085.
    lines = text.removesuffix("\n").split("\n") if text else []
    return [line.removesuffix("\r") for line in lines]


def read_json(path: Path, kind: type, *, hint: str) -> Any:
    """Return the content of a JSON file, a ``kind``; raises what read_lines and parse_json do."""
    content = parse_json(_read(path, hint).removeprefix("\ufeff"), str(path))
    if not isinstance(content, kind):
        found = f"found a {type(content).__name__}, expected a {kind.__name__}"
        raise ValueError(f"{path}: {found}; {hint}")
    return content


def parse_json(text: str, where: str) -> Any:
    """Return what ``text`` says in JSON. Raises ValueError: damaged; names ``where`` it stands."""
    try:
        return JSON.decode(text)
    except KeyError as error:
        raise ValueError(f"{where}: key {error.args[0]!r} is there twice") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not valid JSON ({error})") from None


def _read(path: Path, hint: str) -> str:
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise ValueError(f"{path}: no file, but a folder, a pipe or the like")
    try:
        return path.read_bytes().decode()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: not found; {hint}") from None
    except UnicodeDecodeError as error:
        row = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}, row {row}: expected UTF-8, {error.reason}") from None


def get(row: Any, key: str, kind: type, where: str) -> Any:
    """Return ``row[key]``. Raises ValueError: no object, no such key, or another type there."""
    if not isinstance(row, dict):
        raise ValueError(f"{where}: found {str(row)[:60]!r}, expected an object with {key!r}")
    if key not in row:
        raise ValueError(f"{where}: no {key!r}; found {', '.join(map(str, row))[:200]}")
    if not isinstance(row[key], kind):
        raise ValueError(f"{where}: {key!r} is {str(row[key])[:60]!r}, expected a {kind.__name__}")
    return row[key]


def check_texts(texts: Iterable[str], check: CheckText, where: str) -> None:
    """Call ``check`` with each text. Raises TextError: what it says, behind where it stands."""
    for text in texts:
        try:
            check(text)
        except TextError as error:
            raise TextError(f"{where}: {error}") from None


def find_image(name: str, folders: Sequence[Path], where: str) -> Path:
    """Find file ``name`` in the first folder that has it. Raises FileNotFoundError: none has."""
    for folder in folders:
        if os.path.isfile(folder / name):  # unlike Path.is_file, False for any odd string
            return folder / name
    looked = " and ".join(map(str, folders))
    raise FileNotFoundError(f"{where}: image {name!r} not found in {looked}")


def dataset_folder(data: Path, name: str, *, neither: str) -> Path:
    """Find the authors' data set ``name``: DATA/name, or fetched where ``data`` is :data:`HUB`.

    Raises FileNotFoundError: ``neither`` says what was looked for; OSError: it cannot be fetched.
    """
    if data != HUB:
        if not (data / name).is_dir():
            raise FileNotFoundError(f"{data}: neither {neither} in it, see docs/evaluation.md")
        return data / name
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(f"{_HUB_OWNER}/{name}", repo_type="dataset"))
    except Exception as error:  # of the hub's client, of HTTP, of the socket
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise OSError(
            f"{_HUB_OWNER}/{name}: cannot be fetched from the hub ({reason}): fetch it where there "
            "is a network and pass its parent folder as --data, see docs/evaluation.md"
        ) from error
