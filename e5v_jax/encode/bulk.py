"""Any number of inputs into a folder of shards, which a killed run goes on with.

    manifest.json        what was embedded, how, and with what; at the end, how many rows
    shard-00000.parquet  columns id and embedding; or .npy; and beside it, see shards.py
    failed.jsonl         with --on-error skip: id, place and reason of each row left out
    truncated.jsonl      with --truncate: id and place of each row whose text was cut
    .repeated.tmp        during the run: rows whose id an earlier row has

A shard is a fixed range of input rows, embedded by itself and sealed when whole. So its bytes do
not depend on where a run was killed, nor on how many processes shared the work. The manifest comes
with the first shard: a run that ends before leaves nothing that would bind the next. The first
process reads the input once before, for what needs all of it: the number of rows, the hash,
repeated ids.
"""

import io
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib.metadata import version
from itertools import chain, count, islice, repeat
from operator import methodcaller
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from e5v_jax import __version__
from e5v_jax.atomic import write_whole
from e5v_jax.data.inputs import InputError
from e5v_jax.distributed import from_first, is_first, wait_for_all
from e5v_jax.encode.files import Item, Scan, iterate_items, scan_items
from e5v_jax.encode.options import Args
from e5v_jax.encode.progress import BulkProgress
from e5v_jax.encode.shards import Note, is_whole, note_lines, read_shard, write_shard
from e5v_jax.encode.vectors import find_unusable, to_json
from e5v_jax.lock import Lock
from e5v_jax.storage import as_path, in_bucket

Embed = Callable[..., np.ndarray]  # E5V.encode with what does not depend on the shard
FORMAT_VERSION = 3  # in 2, shards had no seal
_logger = logging.getLogger("e5v_jax")
_MANIFEST = "manifest.json"
_TEMPORARY = ".*.tmp"  # what a killed run may have left half-written
_REPEATED = ".repeated.tmp"
_SHARD_FLAGS = ("shard_size", "format", "embedding_dtype", "on_error")
_NOT_COMPARED = {"versions", "result"}


def describe(args: Args, scan: Scan) -> dict[str, Any]:
    """Make the manifest: all that vectors depend on. Raises FileNotFoundError: no such model."""
    versions = {name: version(name) for name in ("jax", "numpy", "pillow", "transformers")}
    return {
        "format_version": FORMAT_VERSION,
        "input": str(args.input),
        "input_rows": scan.rows,
        "input_sha256": scan.fingerprint,
        **args.describe(),
        "model_sha256": args.content_hash(),
        "device": jax.devices()[0].device_kind,
        **args.encode_options(),
        **{name: getattr(args, name) for name in _SHARD_FLAGS},
        "versions": {**versions, "e5v_jax": __version__},
    }


def check_output(output: Path, manifest: dict[str, Any]) -> None:
    """See that the folder is empty, not there, or of the same run, before a model is loaded.

    One with a manifest and no shard is as good as empty.

    Raises ValueError: the folder is another run's, or none of ours; one line naming what differs.
    """
    entries = list(output.iterdir()) if output.exists() else []
    path = output / _MANIFEST
    if path not in entries:
        if not all(entry.match(_TEMPORARY) for entry in entries):
            raise ValueError(f"{output}: not empty and no output of this command; choose another")
        return
    found = _read_manifest(path)
    if not _has_shards(output):
        return
    if found["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"{output}: begun by another version of e5v_jax (format "
            f"{found['format_version']}, this one writes {FORMAT_VERSION}); finish it with "
            "that version, or choose another --output or delete it"
        )
    for key in sorted((found.keys() | manifest.keys()) - _NOT_COMPARED):
        began, now = (repr(x[key]) if key in x else "absent" for x in (found, manifest))
        if began != now:
            raise ValueError(
                f"{output}: begun with {key} {began}, this run has {now}; choose another --output "
                "or delete it"
            )


def _has_shards(output: Path) -> bool:
    return any(True for _ in output.glob("shard-*"))


def _read_manifest(path: Path) -> dict[str, Any]:
    """Read a manifest. Raises ValueError: it is damaged, or none of ours."""
    try:
        found = json.loads(path.read_bytes().decode("utf-8", "surrogatepass"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path}: damaged ({error}); choose another --output or delete it"
        ) from error
    if not isinstance(found, dict) or "format_version" not in found:
        raise ValueError(f"{path}: no manifest of this command; choose another --output")
    return found


def scan_once(source: Path, *, allow_errors: bool) -> Scan:
    """Scan the input in the first process; the others get its rows and fingerprint from it.

    Raises OSError, ValueError: as :func:`scan_items`, or its line as ValueError.
    """
    scan = from_first(lambda: scan_items(source, allow_errors=allow_errors))
    if jax.process_count() == 1:
        assert scan is not None
        return scan
    told = b"" if scan is None else json.dumps([scan.rows, scan.fingerprint]).encode()
    message = np.frombuffer(told.ljust(128), np.uint8)  # a number and 64 letters fit
    rows, fingerprint = json.loads(bytes(multihost_utils.broadcast_one_to_all(message)))
    return scan or Scan(rows, fingerprint, io.BytesIO())


@contextmanager
def open_output(output: Path, scan: Scan) -> Iterator[None]:
    """Make the folder, in the first process; what a kill left there is removed.

    Without a shard at the end, the folder that was made vanishes again, if no other process may be
    writing to it. Raises OSError: it cannot be made or written to.
    """
    local = not in_bucket(output)
    made = local and not output.exists()
    if is_first():
        _clear(output)
        if local:
            output.mkdir(parents=True, exist_ok=True)
        if scan.repeated.tell():
            scan.repeated.seek(0)
            write_whole(output / _REPEATED, lambda file: shutil.copyfileobj(scan.repeated, file))
    wait_for_all("the output folder is there")
    try:
        yield
    finally:
        if made and jax.process_count() == 1 and not _has_shards(output):
            _clear(output)
            with suppress(OSError):  # something else is there now
                output.rmdir()


def _clear(output: Path) -> None:
    """Remove what a kill left half-written, and the manifest of a run without a shard."""
    for entry in () if in_bucket(output) else output.glob(_TEMPORARY):
        entry.unlink()
    (output / _REPEATED).unlink(missing_ok=True)
    if not _has_shards(output):
        (output / _MANIFEST).unlink(missing_ok=True)


def encode_shards(
    args: Args,
    output: Path,
    manifest: dict[str, Any],
    embed: Embed,
    progress: BulkProgress,
    lock: Lock | None,
) -> None:
    """Embed this process's shards that are not in the folder ``output`` yet, or not whole.

    Raises ValueError: the first bad row, unless skipped; shards before it stay; OSError: disk full,
    or another program has taken the ``lock`` of the output.
    """
    assert args.input is not None

    def is_mine(number: int) -> bool:
        return number % jax.process_count() == jax.process_index()

    def is_wanted(number: int) -> bool:
        path = _shard(output, number, args)
        if not is_mine(number) or is_whole(path):
            return False
        if path.exists():
            _logger.warning("%s: not whole, made again", path)
        return True

    wanted = chain.from_iterable(repeat(is_wanted(i), args.shard_size) for i in count())
    rows = _mark_repeated(iterate_items(args.input, wanted), output / _REPEATED)
    for number, chunk in enumerate(iter(lambda: list(islice(rows, args.shard_size)), [])):
        if items := [item for item in chunk if item is not None]:
            shard = _embed_shard(args, items, embed, progress)
            if lock is not None:
                lock.check()
            if not (output / _MANIFEST).exists():
                write_whole(output / _MANIFEST, methodcaller("write", to_json(manifest)))
            write_shard(_shard(output, number, args), *shard)
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


def _shard(output: Path, number: int, args: Args) -> Path:
    """Name the file whose presence says that shard ``number`` is whole."""
    return output / f"shard-{number:05d}.{args.format}"


def _embed_shard(
    args: Args, items: list[Item], embed: Embed, progress: BulkProgress
) -> tuple[list[str], np.ndarray, dict[Note, list[dict[str, str]]]]:
    """Give ids and vectors of a shard's rows, and the notes on them."""
    raises = args.on_error == "raise"
    for item in items:
        if raises and item.error is not None:
            raise ValueError(f"{item.where}: {item.error}")
    usable = [row for row, item in enumerate(items) if item.error is None]

    def note(error: InputError) -> None:
        row = usable[error.position]
        if raises:
            raise ValueError(f"{items[row].where}: {error.reason}")
        items[row] = replace(items[row], error=error.reason)

    cut: list[int] = []
    vectors = embed([items[row].value for row in usable], on_error=note, on_truncate=cut.append)
    with np.errstate(over="ignore"):  # found next
        vectors = vectors.astype(args.embedding_dtype)
    for position in find_unusable(vectors):
        if items[usable[position]].error is None:  # else its vector is zero
            note(InputError(position, "its vector does not fit --embedding-dtype: use float32"))
    good = [position for position, row in enumerate(usable) if items[row].error is None]
    ids = [item.id for item in items if item.error is None]
    failed = [
        {"id": item.id, "where": item.where, "reason": item.error}
        for item in items
        if item.error is not None
    ]
    progress.passed(len(failed))
    shortened = (items[usable[position]] for position in sorted(cut))
    truncated = [{"id": x.id, "where": x.where} for x in shortened if x.error is None]
    return ids, vectors[good], {"failed": failed, "truncated": truncated}


def finish_output(args: Args, output: Path, rows: int) -> dict[str, int]:
    """Join the notes and complete the manifest, when all processes are through.

    It gives the numbers of rows, embedded, failed and truncated ones, and shards.

    Raises ValueError: a shard is missing.
    """
    shards = [_shard(output, number, args) for number in range(-(-rows // args.shard_size))]
    asked: dict[Note, bool] = {
        "failed": args.on_error == "skip",
        "truncated": args.truncate != "none",
    }
    counts: dict[Note, int] = {}
    for note, wanted in asked.items():
        counts[note] = sum(note_lines(path, note).count(b"\n") for path in shards)
        contents = (note_lines(path, note) for path in shards)
        if wanted:
            write_whole(output / f"{note}.jsonl", methodcaller("writelines", contents))
    (output / _REPEATED).unlink(missing_ok=True)
    result = {
        "rows": rows,
        "embedded": rows - counts["failed"],
        "failed": counts["failed"],
        "truncated": counts["truncated"],
        "shards": len(shards),
    }
    path = output / _MANIFEST
    data = to_json({**_read_manifest(path), "result": result})
    write_whole(path, methodcaller("write", data))
    return result


def read_embeddings(output: str | Path) -> tuple[list[str], np.ndarray]:
    """Read the ids and vectors [N, D] there are, in input order.

    Raises ValueError: there is no shard, one is damaged, or one of a finished run is missing.
    """
    output = as_path(output)
    found = (*output.glob("shard-*.npy"), *output.glob("shard-*.parquet"))
    shards = sorted(found, key=lambda path: (len(path.name), path.name))  # 99999 before 100000
    if not shards:
        raise ValueError(f"{output}: no shard there, neither .parquet nor .npy")
    ids, parts = zip(*map(read_shard, shards), strict=True)
    manifest = _read_manifest(output / _MANIFEST) if (output / _MANIFEST).exists() else {}
    result = manifest.get("result", {"shards": len(shards)})  # of a finished run
    if not isinstance(result, dict) or result.get("shards") != len(shards):
        raise ValueError(
            f"{output}: {len(shards)} shards, manifest.json says {result}; start the command again "
            "to make what is missing"
        )
    return list(chain(*ids)), np.concatenate(parts)
