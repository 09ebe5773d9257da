"""Batches to vectors: the jitted model, few compiled shapes, the device kept busy."""

import logging
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from e5v_jax.encode.batching import Batch
from e5v_jax.families.base import BatchShape, Model, Processor
from e5v_jax.memory import release_freed_memory
from e5v_jax.runtime import Runtime
from e5v_jax.sharding import place_split

T = TypeVar("T")
_logger = logging.getLogger("e5v_jax")
_IN_FLIGHT = 2  # batches on the device: the next one waits there while this one runs


@dataclass
class Statistics:
    """What an encoder has done so far."""

    items: int = 0
    tokens: int = 0
    positions: int = 0  # tokens and padding
    compilations: dict[BatchShape, float] = field(default_factory=dict)  # seconds by shape

    @property
    def padding(self) -> float:
        """The part of all positions that was padding."""
        return 1 - self.tokens / self.positions if self.positions else 0.0


def make_encode_step(graphdef: nnx.GraphDef[Any], runtime: Runtime) -> Any:
    """The jitted ``(parameters, batch) -> vectors`` fp32 [B, D], not normalised."""

    def run(state: nnx.State, batch: Any) -> jax.Array:
        model: Model = nnx.merge(graphdef, state)
        return model.encode(batch)

    # whole vectors everywhere, so that every process has them all
    return jax.jit(run, out_shardings=NamedSharding(runtime.mesh, PartitionSpec()))


def delayed(items: Iterable[T], ahead: int) -> Iterator[T]:
    """Yield each item when ``ahead`` later ones are there, so that what they started goes on."""
    waiting: deque[T] = deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > ahead:
            yield waiting.popleft()
    yield from waiting


class Encoder:
    """The one engine that embeds: for users, in bulk, in evaluations and during training."""

    def __init__(self, graphdef: nnx.GraphDef[Any], processor: Processor, runtime: Runtime) -> None:
        """Make the jitted program of a model, whose parameters each call brings along."""
        self.processor, self.runtime = processor, runtime
        self.statistics = Statistics()
        self._run = make_encode_step(graphdef, runtime)

    def run(
        self, state: nnx.State, batches: Iterable[tuple[Batch, Sequence[Any]]]
    ) -> Iterator[tuple[Batch, np.ndarray]]:
        """Yield each batch with its vectors fp32 [items, D], not normalised, in the order given.

        A batch comes with its items as ``Processor.load`` returned them. The next batch is asked
        for and sent while the device works on the last ones.
        """
        started = ((batch, self.start(state, batch, items)) for batch, items in batches)
        for batch, out in delayed(started, _IN_FLIGHT):
            yield batch, np.asarray(out)[: len(batch.items)]

    def start(self, state: nnx.State, batch: Batch, prepared: Sequence[Any]) -> jax.Array:
        """Send a batch on its way to vectors [rows, D]; one short of items repeats its last.

        One without any only has its shape compiled.
        """
        shape, statistics = batch.shape, self.statistics
        last = prepared[-1] if prepared else None
        filled = [*prepared, *[last] * (shape.rows - len(prepared))]
        arrays = place_split(self.processor.stack(filled, shape), self.runtime.mesh)
        start = time.perf_counter()
        out = self._run(state, arrays)
        if shape not in statistics.compilations:
            seconds = time.perf_counter() - start
            release_freed_memory()
            statistics.compilations[shape] = seconds
            _logger.info(
                "compiled %d rows of %d positions%s in %.1f s (shape %d, %.1f s in all)",
                shape.rows,
                shape.length,
                f" and {shape.shape_key} {self.processor.shape_unit}" if shape.shape_key else "",
                seconds,
                len(statistics.compilations),
                sum(statistics.compilations.values()),
            )
        statistics.items += len(prepared)
        statistics.tokens += sum(item.length for item in batch.items)
        statistics.positions += shape.rows * shape.length * bool(prepared)
        return out
