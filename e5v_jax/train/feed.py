"""The training data as a stream of step inputs: read, tokenise, batch, place on the mesh."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from e5v_jax.data.nli import load_tfds
from e5v_jax.data.pairs import TrainingPairs, load_pairs
from e5v_jax.data.pipeline import BatchIterator, make_batches
from e5v_jax.families.base import Processor, Together
from e5v_jax.runtime import Runtime
from e5v_jax.sharding import local_rows, place_replicated, place_split
from e5v_jax.train.batches import BatchMaker, common_beginning, group_lengths, tokenize_pairs
from e5v_jax.train.config import DataConfig, RunConfig, TrainConfig
from e5v_jax.train.step import PairBatch


class HostBatch(NamedTuple):
    """One step's data on the host."""

    rows: np.ndarray  # int64 [B], row numbers in the training data
    arrays: Any  # NumPy, the global batch: of training, a PairBatch
    tokens: int  # real tokens, padding not counted


class Feed(NamedTuple):
    """What a run takes its steps from."""

    batches: BatchIterator[HostBatch]
    total_steps: int
    columns: int  # 3 for triplets, 2 for pairs, 1 for captioned images
    lengths: tuple[int, ...]  # padded length of each group
    has_images: bool
    together: Together | None = None  # how texts share rows


def load_data(cfg: DataConfig) -> TrainingPairs:
    """Read the training pairs that ``cfg`` names. Raises ValueError: no source, or two."""
    if bool(cfg.path) == (cfg.tfds is not None):
        raise ValueError("data: give either --data.path or --data.tfds")
    return load_tfds(cfg.tfds, data_dir=cfg.tfds_dir) if cfg.tfds else load_pairs(cfg.path)


def group_multiple(cfg: RunConfig, runtime: Runtime, *, texts_per_row: int = 1) -> int:
    """Find what group sizes are multiples of.

    Raises ValueError: chunks do not fit the devices, or the rows of several texts.
    """
    devices = runtime.batch_devices
    least = devices * texts_per_row
    multiple = cfg.chunk_size or least
    if multiple % least:
        rows = f", each with rows of {texts_per_row} texts" if texts_per_row > 1 else ""
        raise ValueError(
            f"chunk_size {cfg.chunk_size} cannot be split over the {devices} devices that share a "
            f"batch{rows}: make it a multiple of {least}"
        )
    return multiple


def open_feed(
    cfg: TrainConfig, pairs: TrainingPairs, processor: Processor, runtime: Runtime
) -> Feed:
    """Tokenise every sentence once; the seed fixes the order of the batches.

    Every process makes the same global batches of (small) texts; images are decoded where needed.

    Raises ValueError: one line naming file, row and column, or the field of ``cfg``.
    """
    multiple = group_multiple(cfg, runtime, texts_per_row=cfg.texts_per_row)
    tokens = tokenize_pairs(pairs, processor, cfg.data)
    together = None
    if cfg.texts_per_row > 1:
        if tokens.image_shapes or processor.preset.pooling == "mean":
            raise ValueError(
                "texts_per_row: rows of several texts are for training on texts alone, of a model "
                "that pools one token: leave it at 1"
            )
        together = Together(cfg.texts_per_row, common_beginning(tokens.items))
    if tokens.image_shapes and cfg.batch_size % min(multiple, cfg.batch_size):
        raise ValueError(
            f"batch_size: {cfg.batch_size} images of a step cannot be split into parts of "
            f"{multiple} (the devices that share a batch, or chunk_size)"
        )
    batches = partial(
        make_batches, pairs, batch_size=cfg.batch_size, seed=cfg.seed, num_epochs=cfg.num_epochs
    )
    order = list(batches())
    total_steps = len(order) if cfg.max_steps is None else min(cfg.max_steps, len(order))
    texts, groups = tokens.lengths[tokens.text_columns], cfg.data.length_groups
    lengths = group_lengths(texts, order[:total_steps], groups=groups, multiple=multiple)
    wanted = local_rows(cfg.batch_size, runtime.mesh)
    pool = ThreadPoolExecutor()  # starts no thread before there is an image
    make_batch = BatchMaker(tokens, processor, lengths, multiple, wanted, pairs.row_ids, pool)

    def host_batch(rows: np.ndarray) -> HostBatch:
        return HostBatch(rows, make_batch(rows), int(tokens.lengths[:, rows].sum()))

    return Feed(
        batches(transform=host_batch),
        total_steps,
        tokens.columns,
        lengths + tuple(shape.length for shape in tokens.image_shapes.values()),
        has_images=bool(tokens.image_shapes),
        together=together,
    )


def place(batch: PairBatch, mesh: Mesh) -> PairBatch:
    """Bring host arrays onto the mesh: groups split along the batch, the rest replicated."""
    rest = place_replicated((batch.order, batch.text_ids), mesh)
    return PairBatch(place_split(batch.groups, mesh), *rest)
