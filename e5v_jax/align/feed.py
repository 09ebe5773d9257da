"""Captions as a stream of step inputs."""

from collections.abc import Callable
from concurrent.futures import Executor
from functools import partial
from typing import Any

import numpy as np

from e5v_jax.align.batches import CaptionBatchMaker, CaptionTokens
from e5v_jax.align.captions import Captions
from e5v_jax.align.config import AlignConfig
from e5v_jax.data.pipeline import batches_of_rows
from e5v_jax.families.base import Measured, Processor
from e5v_jax.runtime import Runtime
from e5v_jax.sharding import local_rows
from e5v_jax.train.feed import Feed, HostBatch, group_multiple


def open_feed(
    cfg: AlignConfig,
    data: Captions,
    tokens: CaptionTokens,
    processor: Processor,
    runtime: Runtime,
    pool: Executor,
    load: Callable[[Measured], Any],
) -> Feed:
    """Batches of ``data``, tokenised; the seed fixes their order, and the captions in them.

    ``load`` and ``pool`` are as in :class:`CaptionBatchMaker`. Raises ValueError: names the field
    of ``cfg``.
    """
    multiple = group_multiple(cfg, runtime)
    if cfg.batch_size % multiple:
        raise ValueError(
            f"batch_size: {cfg.batch_size} images of a step cannot be split into parts of "
            f"{multiple} (the devices that share a batch, or chunk_size)"
        )
    counts = np.array([len(own) for own in tokens.captions])  # int64 [rows]
    wanted = local_rows(cfg.batch_size, runtime.mesh)
    make_batch = CaptionBatchMaker(tokens, processor, wanted, data.row_ids, pool, load)
    # a run that goes on shows the same ones as one that was left alone
    random = np.random.Philox(np.random.SeedSequence([cfg.seed, len(counts)]))
    first = (random.random_raw(len(counts)) % counts.astype(np.uint64)).astype(np.int64)

    def host_batch(rows: np.ndarray, epoch: int) -> HostBatch:
        batch = make_batch(rows, (first[rows] + epoch) % counts[rows])
        seen = sum(tokens.items[row].length for row in rows) + int((batch.labels >= 0).sum())
        return HostBatch(rows, batch, seen)

    batches = partial(
        batches_of_rows,
        np.arange(len(counts)),
        data.row_ids,
        "image",
        batch_size=cfg.batch_size,
        seed=cfg.seed,
        num_epochs=cfg.num_epochs,
    )
    count = sum(1 for _ in batches(transform=lambda numbers, _: numbers))
    return Feed(
        batches(transform=host_batch),
        count if cfg.max_steps is None else min(cfg.max_steps, count),
        columns=1,
        lengths=(tokens.shape.length,),
        has_images=True,
    )
