"""``python -m convert.from_hf SRC DST``: any Hugging Face layout -> a converted folder."""

import dataclasses
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from rich.progress import track

from convert.gguf_tokenizer import build_tokenizer
from convert.hf_source import HfSource, is_original_llava, open_source, resolve
from convert.peft import ADAPTER_FILES, Adapter, merge_into, read_adapter
from convert.safetensors_file import TensorSpec, write_file
from e5v_jax import cli
from e5v_jax.config import ModelConfig
from e5v_jax.converted import (
    FORMAT_VERSION,
    TOKENIZER_FILES,
    ConvertedInfo,
    check_new,
    is_converted,
    layer_groups,
    new_folder,
    write_info,
    write_params,
)
from e5v_jax.prompts import IMAGE_PLACEHOLDER
from e5v_jax.storage import BucketPath
from e5v_jax.tokenizer import load_tokenizer, with_image_token


@dataclass(frozen=True)
class Args:
    """Convert a Hugging Face checkpoint (folder, .gguf file or hub id) to a converted folder."""

    src: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """Folder with config.json and safetensors, a Llama-architecture .gguf file, or a hub id."""
    dst: Annotated[BucketPath, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
    """Folder to write; must not exist. May be in a bucket, gs://BUCKET/FOLDER."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Storage dtype of the weights; auto keeps the source's."""
    adapter: Path | None = None
    """PEFT LoRA folder to carry along (applied whenever the model is loaded)."""
    merge: bool = False
    """Merge the adapter into the weights instead of carrying it."""
    revision: str | None = None
    """Branch, tag or commit, for a hub id."""


def target_dtype(source: HfSource, dtype: str) -> np.dtype[Any]:
    """The NumPy dtype to store."""
    if dtype == "auto":
        return source.dtype()
    import ml_dtypes

    return np.dtype({"bfloat16": ml_dtypes.bfloat16}.get(dtype, dtype))


def _read_groups(
    source: HfSource, dtype: np.dtype[Any], adapter: Adapter | None
) -> Iterator[dict[str, np.ndarray]]:
    groups = layer_groups(sorted(source.shapes()))  # the content hash depends on the order
    for group in track(groups, description="converting", disable=not sys.stderr.isatty()):
        arrays = {}
        for name, array in zip(group, source.read(group), strict=True):
            if adapter is not None:
                array = merge_into(name, array, adapter)
            arrays[name] = array.astype(dtype, copy=False)
            del array
        yield arrays


def write_unused(folder: Path, source: HfSource, dtype: np.dtype[Any]) -> None:
    """Write ``unused.safetensors``, the tensors that only an export needs, if there are any."""
    unused = source.key_map.unused
    if unused:
        specs = [TensorSpec(to, source.tensors.shape(key), dtype) for key, to in unused.items()]
        arrays = (source.tensors.read(key).astype(dtype, copy=False) for key in unused)
        write_file(folder / "unused.safetensors", specs, arrays)


def copy_tokenizer(src: Path, dst: Path) -> None:
    """Bring tokenizer and preprocessor files along, or build them from a GGUF file."""
    if src.is_file():
        build_tokenizer(src).save_pretrained(dst)
        return
    for name in TOKENIZER_FILES:
        if (src / name).is_file():
            shutil.copyfile(src / name, dst / name)


def add_image_token(folder: Path, cfg: ModelConfig) -> ModelConfig:
    """Give the tokenizer of an original LLaVA checkpoint ``<image>``, and ``cfg`` its id.

    The original code puts -200 in place of ``<image>`` after tokenising.
    """
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        return cfg  # weights alone
    tokenizer = load_tokenizer(folder)
    found = tokenizer.added_tokens_encoder.get(IMAGE_PLACEHOLDER)
    if found is not None:
        return dataclasses.replace(cfg, image_token_id=found)
    cfg = with_image_token(cfg, tokenizer)
    tokenizer.save_pretrained(folder)
    return cfg


def copy_adapter(src: Path, dst: Path) -> None:
    """Carry a PEFT folder along, without a training checkpoint's optimizer and the like."""
    dst.mkdir()
    for name in ADAPTER_FILES:
        shutil.copyfile(src / name, dst / name)


def convert(args: Args) -> None:
    """Convert; ``args.dst`` appears only when whole.

    Raises:
        ValueError, FileNotFoundError, FileExistsError: one line naming file, key or folder.
    """
    if args.merge and args.adapter is None:
        raise cli.UsageError("--merge: needs --adapter")
    check_new(args.dst)
    path = resolve(args.src, args.revision)
    if is_converted(path):
        raise ValueError(f"{path}: already a converted folder")
    source = open_source(path)
    adapter = None
    if args.adapter is not None:
        adapter = read_adapter(args.adapter, source.config.text)
    dtype = target_dtype(source, args.dtype)
    with new_folder(args.dst) as folder:
        merged = adapter if args.merge else None
        content_hash, shapes = write_params(folder, _read_groups(source, dtype, merged))
        write_unused(folder, source, dtype)
        copy_tokenizer(path, folder)
        config = source.config
        if is_original_llava(source.raw_config):
            config = add_image_token(folder, config)
        if args.adapter is not None and not args.merge:
            copy_adapter(args.adapter, folder / "adapter")
        (folder / "hf_config.json").write_text(json.dumps(source.raw_config, indent=1) + "\n")
        write_info(
            folder,
            ConvertedInfo(
                format_version=FORMAT_VERSION,
                model=config.to_dict(),
                source=Path(args.src).name if path.is_file() else args.src,
                revision=args.revision,
                dtype=dtype.name,
                content_hash=content_hash,
                parameters=shapes,
            ),
        )
    size = sum(int(np.prod(s)) for s in shapes.values())
    print(f"{args.dst}: {size / 1e6:.1f} M parameters in {dtype.name}, hash {content_hash[:12]}")


if __name__ == "__main__":
    cli.run(convert, Args)
