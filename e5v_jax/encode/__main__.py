"""``python -m e5v_jax.encode --model DIR --text "a dog" "a cat" --image dog.jpg``."""

import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
from PIL import Image
from rich.console import Console
from rich.table import Table
from rich.text import Text

from e5v_jax import cli
from e5v_jax.encode.files import Item, check_output, make_item, read_items, write_vectors

MAX_SHOWN = 20
"""Largest similarity table; more inputs need an output file."""
_LABEL_WIDTH = 32


@dataclass(frozen=True)
class Args:
    """Embed texts and images: write the vectors to a file, or show how similar they are."""

    model: str
    """Converted folder, Hugging Face folder or GGUF file, or a hub id."""
    text: Annotated[tuple[tuple[str, ...], ...], tyro.conf.UseAppendAction] = ()
    """Texts to embed."""
    image: Annotated[tuple[tuple[str, ...], ...], tyro.conf.UseAppendAction] = ()
    """Image files to embed, after the texts."""
    input: Path | None = None
    """Instead of --text and --image: a folder of images, or a file: .txt (one text a line), .jsonl
    (keys text and/or image, and any id) or .csv (columns of the same names). Image paths are
    relative to the file's folder."""
    output: Path | None = None
    """File to write, .npy (float32 [N, D]) or .parquet (id, embedding); must not exist. Without it,
    the cosine similarities of at most 20 inputs are shown."""
    prompt_name: str | None = None
    """Instruction by name: text, image, sts, text_image, cirr_gallery or cirr_query; by
    default chosen by what an input has."""
    prompt: str | None = None
    """Instruction of your own, with <sent> where the text goes and <image> for the image."""
    template: str | None = None
    """Chat template: llama3, mistral, phi3, chatml or vicuna; by default told from the model."""
    adapter: Path | None = None
    """LoRA to apply: a run folder of e5v_jax.train, one of its checkpoints, or a PEFT folder."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Precision of weights and arithmetic."""
    batch_size: int = 32
    """Inputs per device batch."""
    truncate_dim: int | None = None
    """Keep only the first dimensions."""
    normalize: bool = True
    """Scale the vectors to length 1, after truncation."""


def encode(args: Args) -> None:
    """Embed and write or print; ``args.output`` appears only when whole.

    Raises:
        cli.UsageError: flags that do not go together, or a value that cannot be.
        ValueError, OSError: one line naming the file and line, or the flag.
    """
    _check_flags(args)
    # All of it before the model, which may take minutes to load.
    if args.output is not None:
        check_output(args.output)
    items = collect_items(args)
    if args.output is None and not 1 < len(items) <= MAX_SHOWN:
        raise cli.UsageError(
            f"{len(items)} input{'s' * (len(items) > 1)} and no --output: give a file to write "
            f"to, or 2 to {MAX_SHOWN} inputs to compare"
        )

    # Here, not above: they load JAX and transformers, which --help and the errors so far do not
    # need.
    from e5v_jax import E5V
    from e5v_jax.encode.inputs import InputError, choose_prompt
    from e5v_jax.prompts import TEMPLATES

    if args.template is not None and args.template not in TEMPLATES:
        raise cli.UsageError(
            f"--template: unknown {args.template!r}, expected one of {', '.join(TEMPLATES)}"
        )
    try:
        choose_prompt("{}", args.prompt_name, args.prompt)
    except ValueError as error:
        raise cli.UsageError(str(error)) from error

    model = E5V.from_pretrained(
        args.model, dtype=args.dtype, adapter=args.adapter, template=args.template
    )
    try:
        with warnings.catch_warnings():
            # Pillow's two lines about an image that is then refused in one
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            vectors = model.encode(
                [item.value for item in items],
                prompt_name=args.prompt_name,
                prompt=args.prompt,
                batch_size=args.batch_size,
                normalize_embeddings=args.normalize,
                truncate_dim=args.truncate_dim,
            )
    except InputError as error:
        raise ValueError(f"{items[error.position].where}: {error.reason}") from error
    if args.output is None:
        print_similarities([label(item) for item in items], E5V.similarity(vectors, vectors))
    else:
        write_vectors(args.output, [item.id for item in items], vectors)
        rows, dims = vectors.shape
        print(f"{args.output}: {rows} vector{'s' * (rows > 1)} of {dims} dimensions, float32")


def _check_flags(args: Args) -> None:
    for flag, value in (("--batch-size", args.batch_size), ("--truncate-dim", args.truncate_dim)):
        if value is not None and value < 1:
            raise cli.UsageError(f"{flag}: {value}, expected at least 1")
    if args.prompt_name is not None and args.prompt is not None:
        raise cli.UsageError("give --prompt-name or --prompt, not both")
    if (args.input is None) == (not args.text and not args.image):
        raise cli.UsageError("give --input, or --text and --image: one of the two")


def collect_items(args: Args) -> list[Item]:
    """The inputs that the flags ask for; entries of a folder left out are told on stderr.

    Raises:
        ValueError, FileNotFoundError: one line naming the file and line, or the flag.
    """
    if args.input is not None:
        items, skipped = read_items(args.input)
        if skipped:
            more = f" and {len(skipped) - 3} more" if len(skipped) > 3 else ""
            names = ", ".join(skipped[:3]) + more
            print(f"{args.input}: left out, not an image file: {names}", file=sys.stderr)
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


def label(item: Item) -> str:
    """An input in a few printable words."""
    image, text = item.value.get("image"), item.value.get("text")
    parts = ([Path(image).name] if image is not None else []) + (
        [str(text)] if text is not None else []
    )
    words = " ".join(" + ".join(parts).split())
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


if __name__ == "__main__":
    cli.run(encode, Args)
