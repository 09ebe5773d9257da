"""``python -m convert.from_hf SRC DST``: any Hugging Face layout -> a converted folder."""

import json
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import safetensors.numpy
import tyro
from rich.progress import track

from convert.gguf_tokenizer import build_tokenizer
from convert.hf_source import HfSource, open_source, resolve
from convert.peft import Adapter, merge_into, read_adapter
from e5v_jax import cli
from e5v_jax.converted import (
    FORMAT_VERSION,
    TOKENIZER_FILES,
    ConvertedInfo,
    new_folder,
    write_info,
    write_params,
)
from e5v_jax.loading import check_names, stored_shapes


@dataclass(frozen=True)
class Args:
    """Convert a Hugging Face checkpoint (folder, .gguf file or hub id) to a converted folder."""

    src: Annotated[str, tyro.conf.Positional]
    """Folder with config.json and safetensors, a Llama-architecture .gguf file, or a hub id."""
    dst: Annotated[Path, tyro.conf.Positional]
    """Folder to write; must not exist."""
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


def _groups(names: list[str]) -> list[list[str]]:
    """Parameter names grouped by layer, the rest one by one: the unit of memory."""
    groups: dict[str, list[str]] = {}
    for name in names:
        match = re.match(r".*\.layers\.\d+\.", name)
        groups.setdefault(match[0] if match else name, []).append(name)
    return list(groups.values())


def _read_groups(
    source: HfSource, dtype: np.dtype[Any], adapter: Adapter | None
) -> Iterator[dict[str, np.ndarray]]:
    groups = _groups(list(source.shapes()))
    for group in track(groups, description="converting", disable=not sys.stderr.isatty()):
        arrays = {}
        for name, array in zip(group, source.read(group), strict=True):
            if adapter is not None:
                array = merge_into(name, array, adapter)
            arrays[name] = array.astype(dtype, copy=False)
            del array
        yield arrays


def copy_tokenizer(src: Path, dst: Path) -> None:
    """Bring tokenizer and preprocessor files along, or build them from a GGUF file."""
    if src.is_file():
        build_tokenizer(src).save_pretrained(dst)
        return
    for name in TOKENIZER_FILES:
        if (src / name).is_file():
            shutil.copyfile(src / name, dst / name)


def convert(args: Args) -> None:
    """Convert; ``args.dst`` appears only when whole.

    Raises:
        ValueError, FileNotFoundError, FileExistsError: one line naming file, key or folder.
    """
    if args.merge and args.adapter is None:
        raise ValueError("--merge: needs --adapter")
    path = resolve(args.src, args.revision)
    source = open_source(path)
    expected = stored_shapes(source.config)
    check_names(source, expected)
    adapter = None
    if args.adapter is not None:
        adapter = read_adapter(args.adapter, source.config.text)
    dtype = target_dtype(source, args.dtype)
    with new_folder(args.dst) as folder:
        merged = adapter if args.merge else None
        content_hash, shapes = write_params(folder, _read_groups(source, dtype, merged))
        unused = {key: source.tensors.read(key) for key in source.key_map.unused}
        if unused:
            safetensors.numpy.save_file(unused, folder / "unused.safetensors")
        copy_tokenizer(path, folder)
        if args.adapter is not None and not args.merge:
            shutil.copytree(args.adapter, folder / "adapter")
        (folder / "hf_config.json").write_text(json.dumps(source.raw_config, indent=1) + "\n")
        write_info(
            folder,
            ConvertedInfo(
                format_version=FORMAT_VERSION,
                model=source.config.to_dict(),
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
