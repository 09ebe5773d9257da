"""Any number of inputs into a folder of shards, which a killed run goes on with.

    manifest.json        what was embedded, how, and with what; at the end, how many rows
    shard-00000.parquet  columns id and embedding; or .npy, with the ids in shard-00000.ids.json
    failed.jsonl         with --on-error skip: id, place and reason of each row left out
    .repeated.tmp        during the run: rows whose id an earlier row has

A shard is a fixed range of input rows, embedded by itself and renamed when whole. So its bytes do
not depend on where a run was killed, nor on how many processes shared the work. The first process
reads the input once before, for what needs all of it: the number of rows, the hash, repeated ids.
"""

import io
import json
import shutil
from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from itertools import count, islice, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import numpy as np

from e5v_jax import __version__
from e5v_jax.atomic import write_whole
from e5v_jax.data.inputs import InputError
from e5v_jax.encode.files import Item, Scan, iterate_items, scan_items
from e5v_jax.encode.progress import BulkProgress
from e5v_jax.encode.vectors import write_json, write_vectors
from e5v_jax.storage import as_path, in_bucket

if TYPE_CHECKING:
    from e5v_jax import E5V

FORMAT_VERSION = 2  # in 1, input_sha256 was over the sizes of images in Parquet
_REPEATED = ".repeated.tmp"
_NOT_COMPARED = ("versions", "result")


@dataclass(frozen=True)
class BulkOptions:
    """How shards are cut and written; a run can only be resumed with the same."""

    shard_size: int
    """Input rows of a shard."""
    format: Literal["parquet", "npy"]
    embedding_dtype: Literal["float32", "float16"]
    on_error: Literal["raise", "skip"]


@dataclass(frozen=True)
class Share:
    """Says which of the processes that share the work this one is."""

    index: int = 0
    count: int = 1


def check_output(output: Path, manifest: dict[str, Any]) -> None:
    """See that the folder is empty, not there, or of the same run, before a model is loaded.

    Raises:
        ValueError: the folder is another run's, or none of ours; one line naming what differs.
    """
    path = output / "manifest.json"
    if not path.exists():
        if output.exists() and any(not _is_temporary(entry) for entry in output.iterdir()):
            raise ValueError(f"{output}: not empty and no output of this command; choose another")
    else:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"{output}: begun by another version of e5v_jax (format "
                f"{found.get('format_version')}, this one writes {FORMAT_VERSION}); finish it with "
                "that version, or choose another --output or delete it"
            )
        for key in sorted((found.keys() | manifest.keys()) - set(_NOT_COMPARED)):
            if found.get(key) != manifest.get(key):
                raise ValueError(
                    f"{output}: begun with {key} {found.get(key)!r}, this run has "
                    f"{manifest.get(key)!r}; choose another --output or delete it"
                )


def scan_once(source: Path, *, allow_errors: bool) -> Scan:
    """Scan the input in the first process; the others get its rows and fingerprint from it.

    Raises:
        FileNotFoundError, OSError, ValueError: as :func:`e5v_jax.encode.files.scan_items`; in the
            other processes a ValueError of the same line.
    """
    import jax  # here, not above: reading an output folder does not need it
    from jax.experimental import multihost_utils

    from e5v_jax.distributed import wait_for_all

    if jax.process_count() == 1:
        return scan_items(source, allow_errors=allow_errors)
    # Processes give up on each other after 30 s when they first connect. Once connected, they wait
    # for as long as the scan takes.
    wait_for_all("all processes are there")
    scan, failure, told = None, None, b""
    if jax.process_index() == 0:
        try:
            scan = scan_items(source, allow_errors=allow_errors)
            told = json.dumps([scan.rows, scan.fingerprint]).encode()
        except (OSError, ValueError) as error:  # the others must not wait for ever
            failure, told = error, b"!" + str(error).encode("utf-8", "replace")
    message = np.frombuffer(told[:4096].ljust(4096, b"\0"), np.uint8)
    told = bytes(multihost_utils.broadcast_one_to_all(message)).rstrip(b"\0")
    if told.startswith(b"!"):
        raise failure or ValueError(told[1:].decode("utf-8", "replace"))
    rows, fingerprint = json.loads(told)
    return scan or Scan(rows, fingerprint, io.BytesIO())


def start_output(output: Path, manifest: dict[str, Any], scan: Scan) -> None:
    """Make the folder with its manifest, if it is not there; what a kill left there is removed."""
    if not in_bucket(output):
        output.mkdir(parents=True, exist_ok=True)
        for entry in filter(_is_temporary, output.iterdir()):
            entry.unlink()
    path = output / "manifest.json"
    if not path.exists():
        write_json(path, manifest)
    if scan.repeated.tell():
        scan.repeated.seek(0)
        write_whole(output / _REPEATED, lambda file: shutil.copyfileobj(scan.repeated, file))


def _is_temporary(path: Path) -> bool:
    """Say whether a killed run may have left this half-written."""
    return path.name.startswith(".") and path.name.endswith(".tmp")


def encode_shards(
    model: "E5V",
    source: Path,
    output: Path,
    *,
    options: BulkOptions,
    encode: dict[str, Any],
    progress: BulkProgress,
    share: Share = Share(),
    pool: Executor | None = None,
) -> None:
    """Embed this process's shards that are not there yet.

    Args:
        model: what embeds.
        source: see :func:`e5v_jax.encode.files.iterate_items`.
        output: the folder that :func:`start_output` made.
        options: as in its manifest.
        encode: arguments of :meth:`E5V.encode`.
        progress: is told what is done.
        share: every process takes another part.
        pool: decodes images, see :meth:`E5V.encode`.

    Raises:
        ValueError: without ``on_error`` skip, the first bad row; shards before it are kept.
        OSError: the disk is full or the like.
    """
    size = options.shard_size

    def is_mine(number: int) -> bool:
        return number % share.count == share.index

    def wanted() -> Iterator[bool]:
        for number in count():
            mine = is_mine(number) and not shard_path(output, number, options).exists()
            yield from repeat(mine, size)

    rows = _mark_repeated(iterate_items(source, wanted()), output / _REPEATED)
    for number in count():
        chunk = list(islice(rows, size))
        items = [item for item in chunk if item is not None]
        if not chunk:
            return
        if items:
            path = shard_path(output, number, options)
            _encode_shard(model, items, path, options, encode, progress, pool)
        elif is_mine(number):
            progress.passed(len(chunk))


def _mark_repeated(items: Iterator[Item | None], file: Path) -> Iterator[Item | None]:
    """Give items whose id the scan found taken an error, if they have none."""
    with file.open("rb") if file.exists() else io.BytesIO() as lines:
        repeated = map(json.loads, lines)
        row, reason = next(repeated, (-1, ""))
        for number, item in enumerate(items):
            if number == row:
                if item is not None:
                    item = replace(item, value={}, error=item.error or reason)
                row, reason = next(repeated, (-1, ""))
            yield item


def shard_path(output: Path, number: int, options: BulkOptions) -> Path:
    """Name the file whose presence says that shard ``number`` is whole."""
    return output / f"shard-{number:05d}.{options.format}"


def _encode_shard(
    model: "E5V",
    items: list[Item],
    path: Path,
    options: BulkOptions,
    encode: dict[str, Any],
    progress: BulkProgress,
    pool: Executor | None,
) -> None:
    reasons = {row: item.error for row, item in enumerate(items) if item.error is not None}
    usable = [row for row in range(len(items)) if row not in reasons]

    def note(error: InputError) -> None:
        reasons[usable[error.position]] = error.reason

    skip = options.on_error == "skip"
    try:
        vectors = model.encode(
            [items[row].value for row in usable],
            on_error=note if skip else None,
            on_batch=progress.encoded,
            pool=pool,
            show_progress_bar=False,
            **encode,
        )  # [N, D]
    except InputError as error:
        raise ValueError(f"{items[usable[error.position]].where}: {error.reason}") from error
    if reasons and not skip:
        row = min(reasons)
        raise ValueError(f"{items[row].where}: {reasons[row]}")
    progress.passed(len(reasons))
    if reasons:
        lines = [
            json.dumps({"id": items[row].id, "where": items[row].where, "reason": reason}) + "\n"
            for row, reason in sorted(reasons.items())
        ]
        write_whole(_failed_path(path), lambda file: file.write("".join(lines).encode()))
    good = [position for position, row in enumerate(usable) if row not in reasons]
    ids = [items[usable[position]].id for position in good]
    if options.format == "npy":
        write_json(path.with_suffix(".ids.json"), ids)
    # last: it says that all of the shard is there
    write_vectors(path, ids, vectors[good].astype(options.embedding_dtype))


def _failed_path(shard: Path) -> Path:
    return shard.with_suffix(".failed.jsonl")


def finish_output(output: Path, rows: int, options: BulkOptions) -> dict[str, int]:
    """Join what failed and complete the manifest, when all processes are through.

    Returns:
        Rows, embedded rows, failed rows and shards.

    Raises:
        RuntimeError: a shard is missing.
    """
    shards = -(-rows // options.shard_size)
    paths = [shard_path(output, number, options) for number in range(shards)]
    for path in paths:
        if not path.exists():
            raise RuntimeError(f"{path}: missing; start the command again to make it")
    failed = 0

    def join(file: BinaryIO) -> None:
        nonlocal failed
        for path in map(_failed_path, paths):
            lines = path.read_bytes() if path.exists() else b""
            failed += lines.count(b"\n")
            file.write(lines)

    if options.on_error == "skip":
        write_whole(output / "failed.jsonl", join)
    (output / _REPEATED).unlink(missing_ok=True)
    result = {"rows": rows, "embedded": rows - failed, "failed": failed, "shards": shards}
    path = output / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    write_json(path, {**manifest, "result": result})
    return result


def describe(options: BulkOptions, **about: Any) -> dict[str, Any]:
    """Make the manifest of a run."""
    versions = {name: version(name) for name in ("jax", "numpy", "pillow", "transformers")}
    versions["e5v_jax"] = __version__
    return {"format_version": FORMAT_VERSION, **about, **asdict(options), "versions": versions}


def read_embeddings(output: str | Path) -> tuple[list[str], np.ndarray]:
    """Read all ids and vectors [N, D] of a finished or unfinished output folder, in input order.

    Raises:
        ValueError: no shard is there.
    """
    ids: list[str] = []
    parts: list[np.ndarray] = []
    found = as_path(output).glob("shard-*")
    for path in sorted(found, key=lambda path: (len(path.name), path.name)):  # 99999 before 100000
        if path.suffix == ".npy":
            names = path.with_suffix(".ids.json").read_bytes()
            ids += json.loads(names.decode("utf-8", "surrogatepass"))
            with path.open("rb") as file:
                parts.append(np.load(file))
        elif path.suffix == ".parquet":
            import pyarrow.parquet as pq

            with path.open("rb") as file:
                table = pq.read_table(file)
            ids += table["id"].to_pylist()
            flat = table["embedding"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
            parts.append(flat.reshape(len(table), table.schema.field("embedding").type.list_size))
    if not parts:
        raise ValueError(f"{output}: no shard there, neither .parquet nor .npy")
    return ids, np.concatenate(parts)
