"""The training data as a stream of step inputs: read, tokenise, batch, place on the mesh."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerFast

from e5v_jax.config import ModelConfig
from e5v_jax.data.nli import load_tfds
from e5v_jax.data.pairs import TrainingPairs, load_pairs
from e5v_jax.data.pipeline import BatchIterator, make_batches
from e5v_jax.model.llava_next import ImageBatch
from e5v_jax.sharding import local_rows, place_replicated, place_split
from e5v_jax.train.batches import group_lengths, make_pair_batch, tokenize_pairs
from e5v_jax.train.config import DataConfig, TrainConfig
from e5v_jax.train.image_pairs import ImageGroup
from e5v_jax.train.step import PairBatch


class HostBatch(NamedTuple):
    """One step's data on the host."""

    rows: np.ndarray  # int64 [B], row numbers in the training data
    arrays: PairBatch  # NumPy, the global batch
    tokens: int  # real tokens, padding not counted


class Feed(NamedTuple):
    """What a run takes its steps from."""

    batches: BatchIterator[HostBatch]
    total_steps: int
    columns: int  # 3 for triplets, 2 for pairs
    lengths: tuple[int, ...]  # padded length of each group
    has_images: bool


def load_data(cfg: DataConfig) -> TrainingPairs:
    """The training pairs that ``cfg`` names.

    Raises:
        ValueError: no source, or two.
    """
    if bool(cfg.path) == (cfg.tfds is not None):
        raise ValueError("data: give either --data.path or --data.tfds")
    if cfg.tfds is not None:
        return load_tfds(cfg.tfds, data_dir=cfg.tfds_dir)
    return load_pairs(cfg.path)


def open_feed(
    cfg: TrainConfig,
    triplets: TrainingPairs,
    tokenizer: PreTrainedTokenizerFast,
    template: str,
    model: ModelConfig,
    mesh: Mesh,
) -> Feed:
    """Every sentence tokenised once; batches in an order fixed by the seed.

    Every process goes through the same global batches, whose texts are small; :func:`place` gives
    each device its part. Images are decoded where they are needed only.

    Raises:
        ValueError: one line naming file, row and column, or the field of ``cfg``.
    """
    tokens = tokenize_pairs(triplets, tokenizer, cfg.data, template, model)
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    multiple = cfg.chunk_size or devices
    if multiple % devices:
        raise ValueError(
            f"chunk_size {cfg.chunk_size} cannot be split over the {devices} devices that share a "
            f"batch: make it a multiple of {devices}"
        )

    if tokens.images and cfg.batch_size % min(multiple, cfg.batch_size):
        raise ValueError(
            f"batch_size: {cfg.batch_size} images of a step cannot be split into parts of "
            f"{multiple} (the devices that share a batch, or chunk_size)"
        )
    pool = ThreadPoolExecutor()  # starts no thread before there is an image
    wanted = local_rows(cfg.batch_size, mesh)

    def make_images(images: ImageGroup, rows: np.ndarray) -> ImageBatch:
        return images.batch(rows, cfg=model, pool=pool, wanted=wanted, row_ids=triplets.row_ids)

    def host_batch(rows: np.ndarray) -> HostBatch:
        arrays = make_pair_batch(
            tokens,
            rows,
            lengths=lengths,
            pad_id=0,
            multiple=multiple,
            make_images=make_images,
        )
        return HostBatch(rows, arrays, int(tokens.lengths[:, rows].sum()))

    batching: dict[str, Any] = {
        "batch_size": cfg.batch_size,
        "seed": cfg.seed,
        "num_epochs": cfg.num_epochs,
    }
    order = list(make_batches(triplets, **batching))
    total_steps = len(order) if cfg.max_steps is None else min(cfg.max_steps, len(order))
    lengths = group_lengths(
        tokens.lengths[tokens.text_columns],
        order[:total_steps],
        groups=cfg.data.length_groups,
        multiple=multiple,
    )
    batches = make_batches(triplets, **batching, transform=host_batch)
    image_lengths = tuple(images.length for images in tokens.images.values())
    return Feed(
        batches,
        total_steps,
        tokens.columns,
        lengths + image_lengths,
        has_images=bool(tokens.images),
    )


def place(batch: PairBatch, mesh: Mesh) -> PairBatch:
    """Host arrays onto the mesh: groups split along the batch, the rest replicated."""
    return PairBatch(
        groups=place_split(batch.groups, mesh),
        order=place_replicated(batch.order, mesh),
        text_ids=place_replicated(batch.text_ids, mesh),
    )
