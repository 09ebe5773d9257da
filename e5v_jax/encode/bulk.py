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
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import version
from itertools import count, islice, repeat
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from e5v_jax import __version__
from e5v_jax.atomic import write_whole
from e5v_jax.data.inputs import InputError
from e5v_jax.distributed import is_first, wait_for_all
from e5v_jax.encode.files import Item, Scan, iterate_items, scan_items
from e5v_jax.encode.options import Args
from e5v_jax.encode.progress import BulkProgress
from e5v_jax.encode.vectors import write_json, write_vectors
from e5v_jax.storage import as_path, in_bucket

Embed = Callable[..., np.ndarray]  # E5V.encode with what does not depend on the shard
FORMAT_VERSION = 2  # in 1, input_sha256 was over the sizes of images in Parquet
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

    Raises ValueError: the folder is another run's, or none of ours; one line naming what differs.
    """
    path = output / "manifest.json"
    if not path.exists():
        if output.exists() and not all(entry.match(_TEMPORARY) for entry in output.iterdir()):
            raise ValueError(f"{output}: not empty and no output of this command; choose another")
        return
    found = json.loads(path.read_text(encoding="utf-8"))
    if found.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{output}: begun by another version of e5v_jax (format "
            f"{found.get('format_version')}, this one writes {FORMAT_VERSION}); finish it with "
            "that version, or choose another --output or delete it"
        )
    for key in sorted((found.keys() | manifest.keys()) - _NOT_COMPARED):
        if found.get(key) != manifest.get(key):
            raise ValueError(
                f"{output}: begun with {key} {found.get(key)!r}, this run has "
                f"{manifest.get(key)!r}; choose another --output or delete it"
            )


def scan_once(source: Path, *, allow_errors: bool) -> Scan:
    """Scan the input in the first process; the others get its rows and fingerprint from it.

    Raises OSError, ValueError: as :func:`scan_items`, or its line as ValueError.
    """
    # Processes give up on each other after 30 s when they first connect. Once connected, they wait
    # for as long as the scan takes.
    wait_for_all("all processes are there")
    scan, failure, told = None, None, b""
    if is_first():
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
        for entry in output.glob(_TEMPORARY):
            entry.unlink()
    path = output / "manifest.json"
    if not path.exists():
        write_json(path, manifest)
    if scan.repeated.tell():
        scan.repeated.seek(0)
        write_whole(output / _REPEATED, lambda file: shutil.copyfileobj(scan.repeated, file))


def encode_shards(args: Args, output: Path, embed: Embed, progress: BulkProgress) -> None:
    """Embed this process's shards that are not in the folder ``output`` yet.

    Raises ValueError: the first bad row, unless skipped; shards before it stay; OSError: disk full.
    """
    assert args.input is not None

    def is_mine(number: int) -> bool:
        return number % jax.process_count() == jax.process_index()

    def wanted() -> Iterator[bool]:
        for number in count():
            mine = is_mine(number) and not _shard(output, number, args).exists()
            yield from repeat(mine, args.shard_size)

    rows = _mark_repeated(iterate_items(args.input, wanted()), output / _REPEATED)
    for number, chunk in enumerate(iter(lambda: list(islice(rows, args.shard_size)), [])):
        if items := [item for item in chunk if item is not None]:
            _encode_shard(args, items, _shard(output, number, args), embed, progress)
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


def _encode_shard(
    args: Args, items: list[Item], path: Path, embed: Embed, progress: BulkProgress
) -> None:
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

    vectors = embed([items[row].value for row in usable], on_error=note)
    failed = [item for item in items if item.error is not None]
    progress.passed(len(failed))
    if failed:
        reasons = ({"id": item.id, "where": item.where, "reason": item.error} for item in failed)
        lines = "".join(json.dumps(reason) + "\n" for reason in reasons).encode()
        write_whole(path.with_suffix(".failed.jsonl"), lambda file: file.write(lines))
    good = [position for position, row in enumerate(usable) if items[row].error is None]
    ids = [item.id for item in items if item.error is None]
    if args.format == "npy":
        write_json(path.with_suffix(".ids.json"), ids)
    # last: it says that all of the shard is there
    write_vectors(path, ids, vectors[good].astype(args.embedding_dtype))


def finish_output(args: Args, output: Path, rows: int) -> dict[str, int]:
    """Join what failed and complete the manifest, when all processes are through.

    It gives the numbers of rows, embedded and failed ones, and shards.

    Raises RuntimeError: a shard is missing.
    """
    shards = [_shard(output, number, args) for number in range(-(-rows // args.shard_size))]
    for path in shards:
        if not path.exists():
            raise RuntimeError(f"{path}: missing; start the command again to make it")
    lists = [file for shard in shards if (file := shard.with_suffix(".failed.jsonl")).exists()]
    failed = sum(path.read_bytes().count(b"\n") for path in lists)
    if args.on_error == "skip":
        contents = (path.read_bytes() for path in lists)
        write_whole(output / "failed.jsonl", lambda file: file.writelines(contents))
    (output / _REPEATED).unlink(missing_ok=True)
    result = {"rows": rows, "embedded": rows - failed, "failed": failed, "shards": len(shards)}
    path = output / "manifest.json"
    write_json(path, {**json.loads(path.read_text(encoding="utf-8")), "result": result})
    return result


def read_embeddings(output: str | Path) -> tuple[list[str], np.ndarray]:
    """Read the ids and vectors [N, D] there are, in input order. Raises ValueError: no shard."""
    ids: list[str] = []
    parts: list[np.ndarray] = []
    shards = (*as_path(output).glob("shard-*.npy"), *as_path(output).glob("shard-*.parquet"))
    for path in sorted(shards, key=lambda path: (len(path.name), path.name)):  # 99999 before 100000
        with path.open("rb") as file:
            if path.suffix == ".npy":
                parts.append(np.load(file))
                names = path.with_suffix(".ids.json").read_bytes()
                ids += json.loads(names.decode("utf-8", "surrogatepass"))
            else:
                import pyarrow.parquet as pq

                table = pq.read_table(file)
                ids += table["id"].to_pylist()
                flat = table["embedding"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
                dimensions = table.schema.field("embedding").type.list_size
                parts.append(flat.reshape(len(table), dimensions))
    if not parts:
        raise ValueError(f"{output}: no shard there, neither .parquet nor .npy")
    return ids, np.concatenate(parts)
