"""The command ``e5v-convert SRC DST``: any Hugging Face layout -> a converted folder."""

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from rich.progress import track

from e5v_jax import cli
from e5v_jax.atomic import check_new, new_folder
from e5v_jax.checkpoints import converted, trained_with
from e5v_jax.checkpoints.adapters import carried_adapter
from e5v_jax.checkpoints.finite import cast
from e5v_jax.checkpoints.hf_source import HfSource, open_source, resolve
from e5v_jax.checkpoints.peft import ADAPTER_FILES, Adapter, read_adapter, read_merged
from e5v_jax.checkpoints.safetensors_file import TensorSpec, write_file
from e5v_jax.checkpoints.tokenizer import copy_named, load_tokenizer
from e5v_jax.checkpoints.trained_with import TrainedWith
from e5v_jax.checksums import write_checksums
from e5v_jax.data.text import encode_batch
from e5v_jax.presets import HELP, check_preset, find_preset


@dataclass(frozen=True)
class Args:
    """Convert a Hugging Face checkpoint (folder, .gguf file or hub id) to a converted folder."""

    src: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """Folder with config.json and safetensors, a Llama-architecture .gguf file, or a hub id."""
    dst: Annotated[cli.BucketPath, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
    """Folder to write; must not exist. May be in a bucket, gs://BUCKET/FOLDER."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Storage dtype of the weights; auto keeps the source's."""
    adapter: Path | None = None
    """PEFT LoRA folder to carry along (applied whenever the model is loaded); jina-embeddings-v4's
    own is carried without this."""
    merge: bool = False
    """Merge the adapter into the weights instead of carrying it."""
    revision: str | None = None
    """Branch, tag or commit, for a hub id."""
    preset: Annotated[str | None, tyro.conf.arg(help=f"{HELP} It is kept for all commands.")] = None


def _read_groups(
    source: HfSource, dtype: np.dtype[Any], adapter: Adapter | None
) -> Iterator[dict[str, np.ndarray]]:
    # the content hash depends on the order
    groups = source.table.groups(sorted(source.shapes()))
    for group in track(groups, description="converting", disable=not sys.stderr.isatty()):
        yield dict(read_merged(source, group, adapter, dtype))


def write_unused(folder: Path, source: HfSource, dtype: np.dtype[Any]) -> None:
    """Write ``unused.safetensors``, the tensors that only an export needs, if there are any."""
    unused = {key: slot for key, slot in source.slots.items() if not slot.needed}
    if unused:
        prefixes = source.table.export_prefixes
        specs = [TensorSpec(x.key(prefixes), x.row.hf_shape, dtype) for x in unused.values()]
        arrays = (cast(source.read_key(key), dtype, key) for key in unused)
        write_file(folder / "unused.safetensors", specs, arrays)


def write_source(
    folder: Path,
    source: HfSource,
    config: Any,
    dtype: np.dtype[Any],
    adapter: Adapter | None = None,
    *,
    name: str,
    preset: str,
    revision: str | None = None,
) -> str:
    """Write what a converted folder has of ``source``; files beside it are there already.

    ``config`` is the source's, as the tokenizer has it; ``adapter`` is merged; ``name`` and
    ``revision`` say where the source is from. Returns what was written, in a few words.
    """
    content_hash, shapes = converted.write_params(folder, _read_groups(source, dtype, adapter))
    write_unused(folder, source, dtype)
    (folder / "hf_config.json").write_text(json.dumps(source.raw_config, indent=1) + "\n")
    info = converted.ConvertedInfo(
        format_version=converted.FORMAT_VERSION,
        model_type=source.raw_config["model_type"],
        model=asdict(config),
        source=name,
        revision=revision,
        dtype=dtype.name,
        content_hash=content_hash,
        parameters=shapes,
        preset=preset,
    )
    converted.write_info(folder, info)
    write_checksums(folder)
    count = sum(math.prod(shape) for shape in shapes.values())
    return f"{count / 1e6:.1f} M parameters in {dtype.name}, hash {content_hash[:12]}"


def convert(args: Args) -> None:
    """Convert; ``args.dst`` appears only when whole. Raises ValueError or OSError, saying why."""
    if args.preset is not None:
        try:
            check_preset(args.preset)
        except ValueError as error:
            raise cli.UsageError(f"--preset: {error}") from error
    check_new(args.dst)
    path = resolve(args.src, args.revision)
    if converted.is_converted(path):
        raise ValueError(f"{path}: already a converted folder")
    source = open_source(path)
    lora = args.adapter or carried_adapter(path, source)
    if args.merge and lora is None:
        raise cli.UsageError("--merge: needs --adapter")
    tokenizer = load_tokenizer(path)  # before the weights: what is bad is found in seconds
    size = len(tokenizer)
    config = source.match_tokenizer(tokenizer)
    preset = find_preset(args.preset, args.src, *source.known_as)
    last = preset.last_token
    try:
        encode_batch(tokenizer, [f"A dog.{last or ''}"], last_token=last)  # what is around a prompt
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    adapter = None if lora is None else read_adapter(lora, source.table, preset.adapter)
    dtype = source.dtype() if args.dtype == "auto" else np.dtype(args.dtype)
    with new_folder(args.dst) as folder:
        copy_named(path, folder)
        if path.is_file() or len(tokenizer) != size:  # a GGUF file's, or with tokens it lacked
            tokenizer.save_pretrained(folder)
        if lora is not None and not args.merge:
            (folder / "adapter").mkdir()  # without a training checkpoint's optimizer and the like
            copy_named(lora, folder / "adapter", (*ADAPTER_FILES, trained_with.FILE))
        written = write_source(
            folder,
            source,
            config,
            dtype,
            adapter if args.merge else None,
            name=Path(args.src).name if path.is_file() else args.src,
            preset=preset.name,
            revision=args.revision,
        )
    print(f"{args.dst}: {written}")
    said = TrainedWith.read(lora) if lora is not None and args.merge else None
    if said is not None and said.note is not None:
        print(f"{args.dst}: {said.note}")
