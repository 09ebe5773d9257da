"""The command ``e5v-export SRC DST``: a converted folder -> Hugging Face or PEFT folder."""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from rich.progress import track

from e5v_jax import cli
from e5v_jax.atomic import check_new, new_folder
from e5v_jax.checkpoints.adapters import load_adapter
from e5v_jax.checkpoints.converted import ConvertedFolder
from e5v_jax.checkpoints.json_file import read_json
from e5v_jax.checkpoints.model_card import ModelCard, check_adapter, read_scores
from e5v_jax.checkpoints.peft import Adapter, read_merged, write_adapter
from e5v_jax.checkpoints.safetensors_file import SafetensorsFolder, TensorSpec, write_model
from e5v_jax.checkpoints.sentence_transformers import check_steps, write_sentence_transformers
from e5v_jax.checkpoints.tokenizer import copy_named, load_tokenizer
from e5v_jax.checkpoints.trained_with import TrainedWith, choose_inputs
from e5v_jax.checkpoints.usage import Usage
from e5v_jax.families.base import Processor
from e5v_jax.presets import find_preset

SHARD = 5_000_000_000  # bytes; the size Hugging Face shards have


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
    scores: Path | None = None
    """Output folder of e5v_jax.evaluate: its scores go into the model card (README.md)."""


def _tensors(source: ConvertedFolder, adapter: Adapter | None) -> Iterator[np.ndarray]:
    """Every tensor that embeddings need as Hugging Face has it, layer by layer."""
    groups = source.table.groups(source.shapes())
    for group in track(groups, description="exporting", disable=not sys.stderr.isatty()):
        for name, array in read_merged(source, group, adapter, np.dtype(source.info.dtype)):
            yield source.table.stored[name].row.to_hf(array)
            del array


def write_hf(
    folder: Path, source: ConvertedFolder, adapter: Adapter | None, *, shard_bytes: int = SHARD
) -> list[str]:
    """Write a Hugging Face checkpoint into ``folder``; one layer is in memory at a time.

    Returns what the user should know about it, a line each.
    """
    table, prefixes, dtype = source.table, source.table.export_prefixes, source.info.dtype
    slots = [table.stored[name] for group in table.groups(source.shapes()) for name in group]
    specs = [TensorSpec(slot.key(prefixes), slot.row.hf_shape, np.dtype(dtype)) for slot in slots]
    arrays = _tensors(source, adapter)
    if (source.folder / "unused.safetensors").is_file():
        unused = SafetensorsFolder(source.folder)
        specs += [TensorSpec(key, unused.shape(key), unused.dtype(key)) for key in unused.keys()]  # noqa: SIM118 (no mapping)
        arrays = chain(arrays, map(unused.read, unused.keys()))
    write_model(folder, specs, arrays, shard_bytes)
    raw = read_json(source.folder / "hf_config.json", todo="convert the model again")
    config = source.family.hf_config(raw, source.config)
    for part in (config, config.get("text_config"), config.get("vision_config")):
        for key in ("dtype", "torch_dtype"):  # transformers 5 and 4
            if part and key in part:
                part[key] = dtype
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    copy_named(source.folder, folder)
    notes = []
    every = {slot.key(prefixes) for slot in table.slots if not slot.row.optional}
    missing = every - {spec.name for spec in specs}
    if config.get("tie_word_embeddings"):
        missing = {key for key in missing if not key.endswith("lm_head.weight")}
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        notes.append(
            f"the source had no {min(missing)}{more}, which embeddings do not need: transformers "
            "starts it at random"
        )
    image_token, rows = source.config.image_token_id, source.config.text.vocab_size
    if image_token is not None and image_token >= rows:
        notes.append(
            f"<image> is token {image_token}, outside the embedding table of {rows} rows: before "
            "embedding images, transformers needs "
            f"model.resize_token_embeddings({image_token + 1})"
        )
    return notes


def convert(args: Args) -> None:
    """Export; ``args.dst`` appears only when whole. Raises ValueError or OSError, saying why."""
    if args.merge and args.peft:
        raise cli.UsageError("--merge, --peft: choose one")
    check_new(args.dst)
    source = ConvertedFolder(args.src, any_preprocessor=True)
    carried = source.folder / "adapter"
    path = args.adapter or (carried if carried.is_dir() else None)
    if path is None and (args.merge or args.peft):
        raise cli.UsageError(f"{args.src} carries no adapter: name one with --adapter")
    scores = None if args.scores is None else read_scores(args.scores)
    if scores is not None:
        check_adapter(scores, path, given=args.adapter is not None)
    adapter = (
        None
        if path is None
        else load_adapter(path, source, find_preset(None, *source.known_as).adapter)
    )
    said = None if path is None else TrainedWith.read(path)
    with new_folder(args.dst) as folder:
        if args.peft and adapter is not None:
            write_adapter(folder, adapter, source.table, base_model=source.info.source)
            if said is not None:
                said.write(folder)
            notes = [f"PEFT adapter of rank {adapter.lora.rank} from {path}"]
        else:
            merged = "" if path is None else f", {path} merged"
            notes = [f"Hugging Face checkpoint in {source.info.dtype}{merged}"]
            notes += write_hf(folder, source, adapter)
        processor, problem = _prompts(source, path)
        if problem is not None:
            notes += [] if args.peft else [f"nothing for sentence-transformers: {problem}"]
        elif processor is not None and not args.peft:
            notes += write_sentence_transformers(folder, source, processor)
        if not args.peft and said is not None and said.note is not None:
            notes.append(said.note)
        usage = Usage(
            name=args.dst.name,
            table=source.table,
            images="image" in source.config.modalities,
            alone=args.peft,
            processor=processor,
            problem=problem,
            prompt=None if said is None or said.note is None else said.prompt,
            template=None if said is None else said.template,
        )
        ModelCard(usage, source, path, scores).write(folder)
    for note in notes:
        print(f"{args.dst}: {note}")


def _prompts(source: ConvertedFolder, adapter: Path | None) -> tuple[Processor | None, str | None]:
    """What fills the prompts of the model or the adapter, and why others would embed otherwise.

    Raises ValueError: what the adapter says of its training is damaged.
    """
    nothing = dict.fromkeys(("preset", "template", "min_pixels", "max_pixels"))
    preset, template = choose_inputs(adapter, source.known_as, **nothing)
    try:
        tokenizer = load_tokenizer(source.folder)
        processor = source.family.processor(source.config, tokenizer, template, preset)
    except (FileNotFoundError, ValueError) as error:
        return None, str(error)
    try:
        if "image" in source.config.modalities:
            check_steps(preset)
    except ValueError as error:
        return processor, str(error)
    return processor, None
