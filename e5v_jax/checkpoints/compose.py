"""The command ``e5v-compose LLM TOWER DST``: a decoder and a vision tower -> a LLaVA-NeXT.

The result is as one that ``e5v-convert`` makes of a Hugging Face folder, with a projector that has
not been trained yet.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import tyro
from transformers import AddedToken

from e5v_jax import cli
from e5v_jax.atomic import check_new, new_folder
from e5v_jax.checkpoints.converted import ConvertedFolder, is_converted
from e5v_jax.checkpoints.from_hf import write_source
from e5v_jax.checkpoints.hf_source import HfSource, open_source, resolve
from e5v_jax.checkpoints.json_file import read_json
from e5v_jax.checkpoints.names import find_slot
from e5v_jax.checkpoints.safetensors_file import SafetensorsFolder
from e5v_jax.checkpoints.tokenizer import copy_named, load_tokenizer
from e5v_jax.checkpoints.tower import Tower, open_tower
from e5v_jax.data.text import encode_batch
from e5v_jax.families.llava_next import LLAVA_NEXT
from e5v_jax.families.llava_next.config import LlavaNextConfig, select_strategy
from e5v_jax.families.text import TEXT
from e5v_jax.nn.config import UnsupportedModelError, transformers_config
from e5v_jax.nn.parameters import ParameterTable, Slot
from e5v_jax.presets import E5_V
from e5v_jax.prompts import IMAGE_PLACEHOLDER

PROJECTOR_STD = 0.02
"""Of the projector's kernels at the start: what transformers starts LLaVA-NeXT's with."""
_SHAPES = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))  # of LLaVA-NeXT's grids, in tiles
_TABLES = ("embed_tokens.weight", "lm_head.weight")  # with a row for each token


@dataclass(frozen=True)
class Args:
    """Compose a LLaVA-NeXT converted folder from a decoder and a vision tower."""

    llm: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="LLM")]
    """Decoder: a Hugging Face folder, .gguf file, hub id or converted folder of text alone."""
    tower: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TOWER")]
    """CLIP, SigLIP or DINOv2: a Hugging Face folder, hub id or .onnx file."""
    dst: Annotated[cli.BucketPath, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
    """Folder to write; must not exist. May be in a bucket, gs://BUCKET/FOLDER."""
    image_size: int | None = None
    """Side of a tile in pixels; the default is the tower's own. Its positions are interpolated."""
    grid_pinpoints: str | None = None
    """Sizes that images are fitted into, WIDTHxHEIGHT,... in pixels; the default is 1x2, 2x1, 2x2,
    1x3 and 3x1 tiles."""
    vision_feature_layer: tuple[int, ...] = (-2,)
    """The tower's layers whose outputs the projector gets, side by side; -1 is the last."""
    vision_feature_select_strategy: Literal["auto", "default", "full"] = "auto"
    """Whether features leave out the class token (default) or there is none (full)."""
    spatial_pool_stride: int = 1
    """A token is the mean of a square of this many by this many patches: fewer tokens, coarser.
    transformers' LLaVA-NeXT has none, so such a model cannot be exported (e5v-export)."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Storage dtype of the weights; auto keeps the sources'."""
    seed: int = 0
    """Of the projector's random start."""


class Part(NamedTuple):
    """One tensor of the composed checkpoint, as torch has it."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


class Parts:
    """The tensors of a checkpoint that is in no file (:class:`Tensors`)."""

    def __init__(self, parts: dict[str, Part], dtype: np.dtype[Any]) -> None:
        """``dtype`` is what all of them are cast to when they are written."""
        self._parts, self._dtype = parts, dtype

    def keys(self) -> list[str]:
        """All keys."""
        return list(self._parts)

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of one tensor."""
        return self._parts[key].shape

    def dtype(self, key: str) -> np.dtype[Any]:
        """Dtype of one tensor."""
        return self._dtype

    def read(self, key: str) -> np.ndarray:
        """One tensor."""
        return self._parts[key].read()


def _open_llm(path: Path) -> HfSource | ConvertedFolder:
    """Open a decoder. Raises ValueError: a model of another family, or with an adapter."""
    source = ConvertedFolder(path) if is_converted(path) else open_source(path)
    if source.family is not TEXT:
        raise UnsupportedModelError(f"{path}: not a decoder alone: it embeds more than text")
    if isinstance(source, ConvertedFolder) and (path / "adapter").is_dir():
        raise ValueError(f"{path}: carries an adapter; merge it first: e5v-export --merge")
    return source


def _text_parts(llm: HfSource | ConvertedFolder) -> Iterator[tuple[Slot, Part]]:
    """Every tensor of the decoder."""
    if isinstance(llm, HfSource):
        for key, slot in llm.slots.items():
            yield slot, Part(llm.tensors.shape(key), partial(llm.read_key, key))
        return

    def read(slot: Slot) -> np.ndarray:
        (array,) = llm.read([slot.name])
        return slot.row.to_hf(array)

    for slot in llm.table.stored.values():
        yield slot, Part(slot.row.hf_shape, partial(read, slot))
    if (llm.folder / "unused.safetensors").is_file():
        unused = SafetensorsFolder(llm.folder)
        for key in unused.keys():  # noqa: SIM118 (no mapping)
            found = find_slot(key, llm.table)
            assert found is not None, key  # it was written by the same rows
            yield found, Part(unused.shape(key), partial(unused.read, key))


def _with_rows(part: Part, rows: int) -> Part:
    """A table with more rows, each the mean of those that are there.

    Nothing is seen of them in an embedding: the features of the image stand in the places of
    ``<image>``. But transformers looks the token up before it puts them there, so the table must
    have it; and as a mean, as transformers too resizes its tables, it is a token that the head,
    which the table may also be, finds no more likely than others.
    """
    missing, width = rows - part.shape[0], part.shape[1]
    if missing <= 0:
        return part

    def read() -> np.ndarray:
        table = part.read()
        mean = table.mean(axis=0, dtype=np.float32, keepdims=True).astype(table.dtype)
        return np.concatenate([table, np.repeat(mean, missing, axis=0)])

    return Part((rows, width), read)


def _fresh(slot: Slot, seed: int, number: int) -> np.ndarray:
    """The random start of a tensor of the projector, as transformers draws it, fp32."""
    shape = slot.row.hf_shape
    if slot.row.name.endswith(".bias"):
        return np.zeros(shape, np.float32)
    std = PROJECTOR_STD if len(shape) == 2 else shape[0] ** -0.5  # image_newline
    normal = np.random.default_rng([seed, number]).standard_normal(shape, np.float32)
    return normal * np.float32(std)


def _parts(
    llm: HfSource | ConvertedFolder, tower: Tower, table: ParameterTable, rows: int, seed: int
) -> dict[str, Part]:
    """Every tensor of the composed model by its key."""
    prefixes, parts = table.export_prefixes, {}
    for slot, part in _text_parts(llm):
        if slot.row.hf in _TABLES:
            part = _with_rows(part, rows)
        parts[slot.key(prefixes)] = part
    for slot in tower.keys:
        parts[slot.key(prefixes)] = Part(tower.shape(slot), partial(tower.read, slot))
    fresh = [slot for slot in table.slots if slot.row.section in ("projector", "newline")]
    for number, slot in enumerate(fresh):
        parts[slot.key(prefixes)] = Part(slot.row.hf_shape, partial(_fresh, slot, seed, number))
    return parts


def _raw_config(
    llm: HfSource | ConvertedFolder, tower: Tower, args: Args, image_token: int, rows: int
) -> dict[str, Any]:
    """The ``config.json`` of the composed model, as transformers reads it."""
    if isinstance(llm, HfSource):
        raw = llm.raw_config
    else:
        raw = read_json(llm.folder / "hf_config.json", todo="convert the model again")
    size, layer = tower.image_size, args.vision_feature_layer
    strategy = args.vision_feature_select_strategy
    text = {key: x for key, x in raw.items() if key not in ("architectures", "auto_map")}
    tied = transformers_config(raw, raw["model_type"]).tie_word_embeddings
    return {
        "architectures": ["LlavaNextForConditionalGeneration"],
        "model_type": "llava_next",
        "dtype": "float32",
        "torch_dtype": "float32",
        "image_grid_pinpoints": _pinpoints(args.grid_pinpoints, size),
        "image_seq_length": tower.config.num_patches,
        "image_token_index": image_token,
        "multimodal_projector_bias": True,
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": tied,
        "text_config": {**text, "vocab_size": rows},
        "vision_config": tower.raw,
        "vision_feature_layer": layer[0] if len(layer) == 1 else list(layer),
        "vision_feature_select_strategy": (
            select_strategy(tower.config) if strategy == "auto" else strategy
        ),
    }


def _pinpoints(given: str | None, size: int) -> list[list[int]]:
    """The [height, width] of each grid. Raises UsageError: not WIDTHxHEIGHT,..."""
    if given is None:
        return [[size * height, size * width] for height, width in _SHAPES]
    pairs = [re.fullmatch(r"(\d{1,9})x(\d{1,9})", pair.strip()) for pair in given.split(",")]
    if not all(pairs):
        raise cli.UsageError(f"--grid-pinpoints {given}: expected WIDTHxHEIGHT,WIDTHxHEIGHT,...")
    return [[int(pair[2]), int(pair[1])] for pair in pairs if pair]


def compose(args: Args) -> None:
    """Compose; ``args.dst`` appears only when whole. Raises ValueError or OSError, saying why."""
    check_new(args.dst)
    paths = [resolve(name) for name in (args.llm, args.tower)]
    llm, tower = _open_llm(paths[0]), open_tower(paths[1])
    if args.image_size is not None:
        try:
            tower = tower.at(args.image_size)
        except ValueError as error:
            raise cli.UsageError(f"--image-size {args.image_size}: {error}") from error
    tokenizer = load_tokenizer(paths[0])
    tokenizer.add_tokens([AddedToken(IMAGE_PLACEHOLDER, special=True)], special_tokens=True)
    image_token: int = tokenizer.added_tokens_encoder[IMAGE_PLACEHOLDER]
    encode_batch(tokenizer, ["A dog."])  # what is around a prompt
    rows = max(llm.config.text.vocab_size, image_token + 1)
    raw = _raw_config(llm, tower, args, image_token, rows)
    try:
        config = dataclasses.replace(
            LlavaNextConfig.from_hf(raw),
            vision=tower.config,  # its mean and deviation
            spatial_pool_stride=args.spatial_pool_stride,
        )
    except ValueError as error:  # decoder and tower have been read: it is one of the flags
        raise cli.UsageError(str(error)) from error
    dtype = _dtype(llm, tower) if args.dtype == "auto" else np.dtype(args.dtype)
    parts = _parts(llm, tower, LLAVA_NEXT.parameters(config), rows, args.seed)
    source = HfSource(args.dst, Parts(parts, dtype), raw)
    names = [path.name if path.is_file() else str(path) for path in paths]
    with new_folder(args.dst) as folder:
        copy_named(paths[0], folder, ("generation_config.json",))
        tokenizer.save_pretrained(folder)
        settings = LLAVA_NEXT.hf_processor(config, E5_V)
        (folder / "processor_config.json").write_text(json.dumps(settings, indent=1) + "\n")
        written = write_source(
            folder, source, config, dtype, name=" + ".join(names), preset=E5_V.name
        )
    print(f"{args.dst}: {written}")
    print(f"{args.dst}: {IMAGE_PLACEHOLDER} is token {image_token}; the projector is random")
    if tower.others:
        print(f"{args.dst}: left out of {tower.path}: {', '.join(tower.others)} (not the tower's)")


def _dtype(llm: HfSource | ConvertedFolder, tower: Tower) -> np.dtype[Any]:
    """The narrowest dtype that holds every tensor exactly."""
    kinds = {tower.tensors.dtype(key) for key in tower.keys.values()}
    kinds.add(llm.dtype() if isinstance(llm, HfSource) else np.dtype(llm.info.dtype))
    return kinds.pop() if len(kinds) == 1 else np.dtype(np.float32)
