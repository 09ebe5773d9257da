"""``python -m e5v_jax.encode --model DIR --text "a dog" "a cat" --image dog.jpg``."""

import multiprocessing
import sys
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table
from rich.text import Text

from e5v_jax import cli
from e5v_jax.encode.files import Item, list_folder, make_item, read_items
from e5v_jax.encode.options import Args
from e5v_jax.encode.vectors import check_output, write_vectors

if TYPE_CHECKING:
    from e5v_jax import E5V

MAX_SHOWN = 20
"""Largest similarity table; more inputs need an output file."""
_LABEL_WIDTH = 32


def encode(args: Args) -> None:
    """Embed and write or print; an output file or shard appears only when whole.

    Raises:
        cli.UsageError: flags that do not go together, or a value that cannot be.
        ValueError, OSError: one line naming the file and line, or the flag.
    """
    args.check()
    with warnings.catch_warnings():
        # Pillow's two lines about an image that is then refused in one
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        if args.is_bulk:
            encode_to_folder(args)
        else:
            encode_in_memory(args)


def encode_in_memory(args: Args) -> None:
    """Inputs that fit in memory, to one file or to the terminal."""
    # All of it before the model, which may take minutes to load.
    if args.output is not None:
        check_output(args.output)
    items = collect_items(args)
    if args.output is None and not 1 < len(items) <= MAX_SHOWN:
        raise cli.UsageError(
            f"{len(items)} input{'s' * (len(items) > 1)} and no --output: give a file to write "
            f"to, or 2 to {MAX_SHOWN} inputs to compare"
        )
    model = load_model(args)

    # Here, not above: they load JAX and transformers, which --help and the errors so far do not
    # need.
    from e5v_jax import E5V
    from e5v_jax.data.inputs import InputError

    try:
        with decoding_pool(args.num_workers) as pool:
            vectors = model.encode([item.value for item in items], pool=pool, **options(args))
    except InputError as error:
        raise ValueError(f"{items[error.position].where}: {error.reason}") from error
    if args.output is None:
        print_similarities([label(item) for item in items], E5V.similarity(vectors, vectors))
    else:
        write_vectors(args.output, [item.id for item in items], vectors)
        rows, dims = vectors.shape
        print(f"{args.output}: {rows} vector{'s' * (rows > 1)} of {dims} dimensions, float32")


def encode_to_folder(args: Args) -> None:
    """Any number of inputs, to shards; see e5v_jax/encode/bulk.py."""
    assert args.input is not None and args.output is not None
    cli.show_log()
    if args.input.is_dir():
        tell_left_out(args.input, list_folder(args.input)[1])

    from e5v_jax.distributed import initialize, is_first, wait_for_all

    initialize(distributed=args.distributed)  # before anything else of JAX

    import jax

    from e5v_jax.encode import bulk
    from e5v_jax.encode.progress import bulk_progress

    scan = bulk.scan_once(args.input, allow_errors=args.on_error == "skip")
    how = bulk.BulkOptions(args.shard_size, args.format, args.embedding_dtype, args.on_error)
    arguments = options(args)
    manifest = bulk.describe(
        how,
        input=str(args.input),
        input_rows=scan.rows,
        input_sha256=scan.fingerprint,
        **args.describe(),
        model_sha256=args.content_hash(),
        device=jax.devices()[0].device_kind,
        **arguments,
    )
    bulk.check_output(args.output, manifest)
    model = load_model(args)
    if is_first():
        bulk.start_output(args.output, manifest, scan)
    wait_for_all("the output folder is there")
    share = bulk.Share(jax.process_index(), jax.process_count())
    with (
        decoding_pool(args.num_workers) as pool,
        bulk_progress(scan.rows // share.count, model.statistics) as progress,
    ):
        bulk.encode_shards(
            model,
            args.input,
            args.output,
            options=how,
            encode=arguments,
            progress=progress,
            share=share,
            pool=pool,
        )
    wait_for_all("all shards are written")
    if is_first():
        result = bulk.finish_output(args.output, scan.rows, how)
        print(
            f"{args.output}: {result['embedded']} of {result['rows']} rows embedded in "
            f"{result['shards']} shard{'s' * (result['shards'] > 1)}, {progress.summary()}"
        )
        if result["failed"]:
            print(f"{result['failed']} failed: see {args.output / 'failed.jsonl'}")


def load_model(args: Args) -> "E5V":
    """The model the flags ask for, on this process's devices.

    Raises:
        cli.UsageError: an unknown prompt, or a mesh that the devices do not make.
        FileNotFoundError, ValueError: it cannot be loaded.
    """
    import jax

    from e5v_jax.prompts import choose_prompt

    try:
        choose_prompt(args.prompt_name, args.prompt)
    except ValueError as error:
        raise cli.UsageError(str(error)) from error
    return args.load(jax.local_devices())


def options(args: Args) -> dict[str, Any]:
    """Arguments of ``E5V.encode``."""
    return {
        "prompt_name": args.prompt_name,
        "prompt": args.prompt,
        "batch_size": args.batch_size,
        "max_num_batched_tokens": args.max_num_batched_tokens,
        "normalize_embeddings": args.normalize,
        "truncate_dim": args.truncate_dim,
    }


@contextmanager
def decoding_pool(num_workers: int) -> Iterator[Executor | None]:
    """Processes that decode images; None leaves it to threads."""
    if num_workers == 0:
        yield None
        return
    spawn = multiprocessing.get_context("spawn")  # JAX has threads, which a fork would lose
    with ProcessPoolExecutor(num_workers, mp_context=spawn) as pool:
        yield pool


def collect_items(args: Args) -> list[Item]:
    """The inputs that the flags ask for; entries of a folder left out are told on stderr.

    Raises:
        ValueError, FileNotFoundError: one line naming the file and line, or the flag.
    """
    if args.input is not None:
        items, skipped = read_items(args.input)
        tell_left_out(args.input, skipped)
        return items
    texts = [text for group in args.text for text in group]
    images = [image for group in args.image for image in group]
    return [
        make_item(f"--text {i}", f"text-{i}", text=text, image=None)
        for i, text in enumerate(texts, start=1)
    ] + [
        make_item(f"--image {i}", f"image-{i}", text=None, image=image)
        for i, image in enumerate(images, start=1)
    ]


def tell_left_out(folder: Path, names: list[str]) -> None:
    """Say which entries of a folder are no images."""
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        print(
            f"{folder}: left out, not an image file: {', '.join(names[:3])}{more}", file=sys.stderr
        )


def label(item: Item) -> str:
    """An input in a few printable words."""
    image, text = item.value.get("image"), item.value.get("text")
    name = [] if image is None else ["image" if isinstance(image, bytes) else Path(image).name]
    words = " ".join(" + ".join(name + ([] if text is None else [str(text)])).split())
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


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; ``argv`` are its words, None takes the command line's."""
    if "--dry-run" in (argv or sys.argv):
        sys.exit("error: --dry-run is a command of its own: python -m e5v_jax.dryrun encode --help")
    cli.run(encode, Args, argv=argv)


if __name__ == "__main__":
    main()
