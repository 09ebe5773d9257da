"""The encode command: to the terminal, to one file, or to a folder of shards."""

import sys
import warnings
from concurrent.futures import Executor
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table
from rich.text import Text

from e5v_jax import cli
from e5v_jax.encode.files import Item, list_folder, make_item, read_items
from e5v_jax.encode.options import Args
from e5v_jax.encode.vectors import check_folder, check_output, write_vectors

MAX_SHOWN = 20  # largest similarity table; more inputs need an output file
_LABEL_WIDTH = 32


def encode(args: Args) -> None:
    """Embed and write or print; an output file or shard appears only when whole.

    Raises cli.UsageError: flags that do not go together, a bad value; ValueError, OSError: one line
    naming the file and line, or the flag.
    """
    args.check()
    if args.instruction is not None or args.max_length is not None:
        processor = args.load_processor()  # before the weights, which may take minutes to load
        processor.preset.choose(args.prompt_name, args.prompt, args.instruction)
        processor.longest(args.max_length)
    # Pillow's two lines about an image that is then refused in one
    with warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning):
        (encode_to_folder if args.is_bulk else encode_in_memory)(args)


def encode_in_memory(args: Args) -> None:
    """Embed inputs that fit in memory, to one file or to the terminal."""
    # All of it before the model, which may take minutes to load.
    if args.output is not None:
        check_output(args.output)
    items = collect_items(args)
    if args.output is None and not 1 < len(items) <= MAX_SHOWN:
        raise cli.UsageError(
            f"{len(items)} input{'s' * (len(items) > 1)} and no --output: give a file to write "
            f"to, or 2 to {MAX_SHOWN} inputs to compare"
        )
    # Here, not above: --help and the errors so far do not need JAX.
    import jax

    from e5v_jax.data.inputs import InputError
    from e5v_jax.lock import hold

    with nullcontext() if args.output is None else hold(args.output):
        if args.output is not None:
            check_output(args.output)  # another program may have been faster
        model = args.load(jax.local_devices())
        try:
            with decoding_pool(args.num_workers) as pool:
                values, cut = [item.value for item in items], list[int]()
                vectors = model.encode(
                    values, pool=pool, on_truncate=cut.append, **args.encode_options()
                )
        except InputError as error:
            raise ValueError(f"{items[error.position].where}: {error.reason}") from error
        if cut:
            print(f"{len(cut)} of {len(items)} inputs: text cut to fit", file=sys.stderr)
        if args.output is not None:
            write_vectors(args.output, [item.id for item in items], vectors)
            rows, dims = vectors.shape
            print(f"{args.output}: {rows} vector{'s' * (rows > 1)} of {dims} dimensions, float32")
            return
    print_similarities([label(item) for item in items], model.similarity(vectors, vectors))


def encode_to_folder(args: Args) -> None:
    """Embed any number of inputs to shards; see e5v_jax/encode/bulk.py."""
    assert args.input is not None and args.output is not None
    cli.show_log()
    if args.input.is_dir():
        tell_left_out(args.input, list_folder(args.input)[1])

    from e5v_jax.distributed import initialize, is_first, wait_for_all

    initialize(distributed=args.distributed)  # before anything else of JAX

    import jax

    from e5v_jax.encode import bulk
    from e5v_jax.encode.progress import BulkProgress
    from e5v_jax.lock import hold_in_first

    args.runtime(jax.local_devices())  # refuses what these devices cannot do
    scan = bulk.scan_once(args.input, allow_errors=args.on_error == "skip")
    manifest = bulk.describe(args, scan)
    check_folder(args.output)
    with hold_in_first(args.output) as lock:
        bulk.check_output(args.output, manifest)
        model = args.load(jax.local_devices())
        with (
            bulk.open_output(args.output, scan),
            decoding_pool(args.num_workers) as pool,
            BulkProgress(scan.rows // jax.process_count(), model.statistics) as progress,
        ):
            embed = partial(model.encode, pool=pool, **args.encode_options())
            embed = partial(embed, on_batch=progress.encoded, show_progress_bar=False)
            bulk.encode_shards(args, args.output, manifest, embed, progress, lock)
        wait_for_all("all shards are written")
        if is_first():
            result = bulk.finish_output(args, args.output, scan.rows)
            print(
                f"{args.output}: {result['embedded']} of {result['rows']} rows embedded in "
                f"{result['shards']} shard{'s' * (result['shards'] > 1)}, {progress.summary()}"
            )
            if result["truncated"]:
                listed = args.output / "truncated.jsonl"
                print(f"{result['truncated']} with their text cut to fit: see {listed}")
            failed = f"{result['failed']} failed: see {args.output / 'failed.jsonl'}"
            if not result["embedded"]:
                raise ValueError(f"{args.output}: no row could be embedded, {failed}")
            if result["failed"]:
                print(failed)


def decoding_pool(num_workers: int) -> AbstractContextManager[Executor | None]:
    """Start processes that decode images; None leaves it to threads."""
    if num_workers == 0:
        return nullcontext()
    from e5v_jax.encode.decoding import DecodingPool

    return DecodingPool(num_workers)


def collect_items(args: Args) -> list[Item]:
    """Read the inputs that the flags ask for; entries of a folder left out are told on stderr.

    Raises ValueError, OSError: one line naming the file and line, or the flag.
    """
    if args.input is not None:
        items, skipped = read_items(args.input)
        tell_left_out(args.input, skipped)
    else:
        items = [
            make_item(f"--text {i}", f"text-{i}", text=text, image=None)
            for i, text in enumerate(chain(*args.text), start=1)
        ] + [
            make_item(f"--image {i}", f"image-{i}", text=None, image=image)
            for i, image in enumerate(chain(*args.image), start=1)
        ]
    for item in items:
        if item.error is not None:
            raise ValueError(f"{item.where}: {item.error}")
    return items


def tell_left_out(folder: Path, names: list[str]) -> None:
    """Say which entries of a folder are no images."""
    if names:
        told = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        print(f"{folder}: left out, not an image file: {told}", file=sys.stderr)


def label(item: Item) -> str:
    """Show an input in a few printable words."""
    image, text = item.value.get("image"), item.value.get("text")
    name = "image" if isinstance(image, bytes) else Path(image or "").name
    words = " ".join(" + ".join(str(part) for part in (name, text) if part).split())
    words = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in words)
    return words if len(words) <= _LABEL_WIDTH else words[: _LABEL_WIDTH - 1] + "…"


def print_similarities(labels: list[str], cosines: np.ndarray) -> None:
    """Print cosine similarities [N, N] as a table."""
    table = Table("", "", caption="cosine similarity", box=None)
    for number in range(1, len(labels) + 1):
        table.add_column(str(number), justify="right", no_wrap=True)
    for number, (name, row) in enumerate(zip(labels, cosines, strict=True), start=1):
        table.add_row(str(number), Text(name, no_wrap=True), *(f"{value:.3f}" for value in row))
    console = Console()
    # Numbers cut short would be worse than lines that a narrow terminal wraps.
    console.width = max(console.width, _LABEL_WIDTH + 8 * (len(labels) + 1))
    console.print(table)
