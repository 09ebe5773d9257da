"""Prepared batches to vectors: the jitted model, few compiled shapes, the device kept busy."""

import logging
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from e5v_jax.encode.arrays import stack
from e5v_jax.encode.batching import Batch
from e5v_jax.encode.inputs import Prepared
from e5v_jax.model.attention import Implementation, use_attention
from e5v_jax.model.llava_next import ImageBatch, LlavaNext, TextBatch
from e5v_jax.sharding import batch_sharding

_logger = logging.getLogger("e5v_jax")
_IN_FLIGHT = 2  # batches on the device: the next one waits there while this one runs


@dataclass
class Statistics:
    """What an encoder has done so far."""

    items: int = 0
    tokens: int = 0
    positions: int = 0
    """Tokens and padding."""
    compilations: dict[tuple[int, int, int], float] = field(default_factory=dict)
    """Seconds by shape (rows, length, tiles of a row)."""

    @property
    def padding(self) -> float:
        """The part of all positions that was padding."""
        return 1 - self.tokens / self.positions if self.positions else 0.0


class Encoder:
    """Holds the parameters and runs the jitted model over batches."""

    def __init__(
        self,
        model: LlavaNext,
        mesh: Mesh,
        *,
        pad_id: int,
        attn_implementation: Implementation = "auto",
    ) -> None:
        graphdef, self._state = nnx.split(model)
        self._pad_id = pad_id
        self._sharding = batch_sharding(mesh)
        self.multiple = mesh.shape["data"] * mesh.shape["fsdp"]
        """Of which the rows of a batch are a multiple: devices that share it."""
        self.statistics = Statistics()

        def run(state: nnx.State, batch: TextBatch | ImageBatch) -> jax.Array:
            abstract = mesh.abstract_mesh  # for sharding.split_batch
            with use_attention(attn_implementation), jax.sharding.use_abstract_mesh(abstract):
                merged: LlavaNext = nnx.merge(graphdef, state)
                return merged.encode(batch)

        self._run = jax.jit(run)

    def run(
        self, batches: Iterable[tuple[Batch, Sequence[Prepared]]]
    ) -> Iterator[tuple[Batch, np.ndarray]]:
        """Each batch with its vectors fp32 [items, D], not normalised, in the order given.

        The next batch is asked for and sent while the device works on the last ones.
        """
        running: deque[tuple[Batch, jax.Array]] = deque()
        for batch, prepared in batches:
            running.append((batch, self._start(batch, prepared)))
            if len(running) > _IN_FLIGHT:
                yield self._finish(*running.popleft())
        while running:
            yield self._finish(*running.popleft())

    def _start(self, batch: Batch, prepared: Sequence[Prepared]) -> jax.Array:
        """Vectors [rows, D], on their way."""
        # a batch short of items repeats its last one
        filled = [*prepared, *[prepared[-1]] * (batch.rows - len(prepared))]
        arrays = stack(filled, batch.length, num_tiles=batch.tiles, pad_id=self._pad_id)
        shape = (batch.rows, batch.length, batch.tiles)
        start = time.perf_counter()
        out = self._run(self._state, jax.device_put(arrays, self._sharding))
        statistics = self.statistics
        if shape not in statistics.compilations:
            seconds = time.perf_counter() - start
            statistics.compilations[shape] = seconds
            _logger.info(
                "compiled %d rows of %d positions%s in %.1f s (shape %d, %.1f s in all)",
                batch.rows,
                batch.length,
                f" and {batch.tiles} tiles" if batch.tiles else "",
                seconds,
                len(statistics.compilations),
                sum(statistics.compilations.values()),
            )
        statistics.items += len(prepared)
        statistics.tokens += sum(len(item.ids) for item in prepared)
        statistics.positions += batch.rows * batch.length
        return out

    def _finish(self, batch: Batch, out: jax.Array) -> tuple[Batch, np.ndarray]:
        return batch, np.asarray(out)[: len(batch.items)]
