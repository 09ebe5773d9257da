"""``python -m convert.to_hf SRC DST``: a converted folder -> Hugging Face or PEFT folder."""

import copy
import dataclasses
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from rich.progress import track

from convert.hf_source import SafetensorsFolder, is_original_llava, unused_shapes
from convert.names import HF_PREFIXES, TEXT_PREFIXES, invert, invert_shape, to_hf_name
from convert.peft import Adapter, merge_into, write_adapter
from convert.safetensors_file import SHARD_BYTES, TensorSpec, write_model
from e5v_jax import cli
from e5v_jax.config import ModelConfig
from e5v_jax.converted import (
    TOKENIZER_FILES,
    ConvertedFolder,
    check_new,
    layer_groups,
    new_folder,
)
from e5v_jax.embedder import load_adapter


@dataclass(frozen=True)
class Args:
    """Write a converted folder as a Hugging Face folder, or its adapter as a PEFT folder."""

    src: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """Converted folder."""
    dst: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
    """Folder to write; must not exist."""
    adapter: Path | None = None
    """PEFT LoRA folder or run folder of e5v_jax.train; else the one that SRC carries, if any."""
    merge: tyro.conf.FlagCreatePairsOff[bool] = False
    """Merge the adapter into the weights. This is the default; the flag insists on an adapter."""
    peft: tyro.conf.FlagCreatePairsOff[bool] = False
    """Write the adapter alone, as a PEFT folder."""


def hf_config(raw: dict[str, Any], cfg: ModelConfig, dtype: str) -> dict[str, Any]:
    """The ``config.json`` to export: the source's, or one that transformers has a class for."""
    config = _from_original(raw, cfg) if is_original_llava(raw) else copy.deepcopy(raw)
    for part in (config, config.get("text_config"), config.get("vision_config")):
        for key in ("dtype", "torch_dtype"):  # transformers 5 and 4
            if part and key in part:
                part[key] = dtype
    return config


def _from_original(raw: dict[str, Any], cfg: ModelConfig) -> dict[str, Any]:
    """``LlavaNextConfig`` for a checkpoint of the original LLaVA code."""
    assert cfg.vision is not None
    kept = ("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
    text = {
        **dataclasses.asdict(cfg.text),  # rope_theta among them, for transformers 4
        **{key: raw[key] for key in kept if key in raw},
        "hidden_act": "silu",
        "rope_parameters": {"rope_type": "default", "rope_theta": cfg.text.rope_theta},
    }
    if cfg.text.model_type == "mistral":
        text["sliding_window"] = None  # transformers' default is 4096
    return {
        "architectures": ["LlavaNextForConditionalGeneration"],
        "model_type": "llava_next",
        "dtype": "float32",
        "torch_dtype": "float32",
        "image_grid_pinpoints": [list(size) for size in cfg.image_grid_pinpoints],
        "image_seq_length": cfg.vision.num_patches,
        "image_token_index": cfg.image_token_id,
        "multimodal_projector_bias": True,
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": raw.get("tie_word_embeddings", False),
        "text_config": text,
        "vision_config": {**dataclasses.asdict(cfg.vision), "model_type": "clip_vision_model"},
        "vision_feature_layer": cfg.vision_feature_layer,
        "vision_feature_select_strategy": "default",
    }


def _tensors(
    source: ConvertedFolder, unused: SafetensorsFolder | None, adapter: Adapter | None
) -> Iterator[np.ndarray]:
    """Every tensor as Hugging Face has it, in the order of :func:`_specs`."""
    groups = layer_groups(source.shapes())
    for group in track(groups, description="exporting", disable=not sys.stderr.isatty()):
        for name, array in zip(group, source.read(group), strict=True):
            if adapter is not None:
                array = merge_into(name, array, adapter).astype(source.info.dtype, copy=False)
            yield invert(to_hf_name(name, HF_PREFIXES)[1], array)
            del array
    if unused is not None:
        yield from map(unused.read, unused.keys())


def _specs(source: ConvertedFolder, unused: SafetensorsFolder | None) -> list[TensorSpec]:
    prefixes = TEXT_PREFIXES if source.config.vision is None else HF_PREFIXES
    specs = []
    for name in (name for group in layer_groups(source.shapes()) for name in group):
        key, transform = to_hf_name(name, prefixes)
        shape = invert_shape(transform, source.shapes()[name])
        specs.append(TensorSpec(key, shape, np.dtype(source.info.dtype)))
    if unused is not None:
        specs += [TensorSpec(key, unused.shape(key), unused.dtype(key)) for key in unused.keys()]  # noqa: SIM118 (no mapping)
    return specs


def write_hf(
    folder: Path,
    source: ConvertedFolder,
    adapter: Adapter | None,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> list[str]:
    """Write a Hugging Face checkpoint into ``folder``; one layer is in memory at a time.

    Returns what the user should know about it, a line each.
    """
    unused = None
    if (source.folder / "unused.safetensors").is_file():
        unused = SafetensorsFolder(source.folder)
    specs = _specs(source, unused)
    write_model(folder, specs, _tensors(source, unused, adapter), shard_bytes=shard_bytes)
    raw = json.loads((source.folder / "hf_config.json").read_text())
    config = hf_config(raw, source.config, source.info.dtype)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name in TOKENIZER_FILES:
        if (source.folder / name).is_file():
            shutil.copyfile(source.folder / name, folder / name)
    return _notes(source.config, {spec.name for spec in specs}, source.shapes(), config)


def _notes(
    cfg: ModelConfig,
    keys: set[str],
    stored: dict[str, tuple[int, ...]],
    config: dict[str, Any],
) -> list[str]:
    notes = []
    missing = set(unused_shapes(cfg, stored)) - keys
    if config.get("tie_word_embeddings"):
        missing = {key for key in missing if not key.endswith("lm_head.weight")}
    if missing:
        notes.append(
            f"the source had no {min(missing)}"
            + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
            + ", which embeddings do not need: transformers starts it at random"
        )
    if cfg.image_token_id is not None and cfg.image_token_id >= cfg.text.vocab_size:
        notes.append(
            f"<image> is token {cfg.image_token_id}, outside the embedding table of "
            f"{cfg.text.vocab_size} rows: before embedding images, transformers needs "
            f"model.resize_token_embeddings({cfg.image_token_id + 1})"
        )
    return notes


def convert(args: Args) -> None:
    """Export; ``args.dst`` appears only when whole.

    Raises:
        ValueError, FileNotFoundError, FileExistsError: one line naming file, key or folder.
    """
    if args.merge and args.peft:
        raise cli.UsageError("--merge, --peft: choose one")
    check_new(args.dst)
    source = ConvertedFolder(args.src)
    path = args.adapter
    if path is None and (source.folder / "adapter").is_dir():
        path = source.folder / "adapter"
    if path is None and (args.merge or args.peft):
        raise cli.UsageError(f"{args.src} carries no adapter: name one with --adapter")
    adapter = None if path is None else load_adapter(path, source.config)
    with new_folder(args.dst) as folder:
        if args.peft and adapter is not None:
            text_only = source.config.vision is None
            write_adapter(folder, adapter, text_only=text_only, base_model=source.info.source)
            notes = [f"PEFT adapter of rank {adapter.lora.rank} from {path}"]
        else:
            notes = write_hf(folder, source, adapter)
            notes.insert(0, f"Hugging Face checkpoint in {source.info.dtype}")
            notes[0] += "" if path is None else f", {path} merged"
    for note in notes:
        print(f"{args.dst}: {note}")


if __name__ == "__main__":
    cli.run(convert, Args)
