"""Inputs to vectors: distinct ones in windows, batches of similar length, images decoded ahead."""

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from PIL import Image

from e5v_jax.config import ModelConfig
from e5v_jax.encode.batching import Batch, plan_batches
from e5v_jax.encode.encoder import Encoder
from e5v_jax.encode.inputs import Input, InputError, Measured, Prepared, load

WINDOW = 8192
"""Inputs that are tokenised, measured and sorted at a time."""
_AHEAD = 8
"""Batches whose images are being decoded while the device works."""

OnError = Callable[[InputError], None]


@dataclass(frozen=True)
class BatchLimits:
    """The size of a device batch."""

    max_rows: int | None
    max_tokens: int


def encode_stream(
    inputs: Sequence[Input],
    *,
    encoder: Encoder,
    measure: Callable[[Sequence[Input], OnError | None], list[Measured]],
    cfg: ModelConfig,
    limits: BatchLimits,
    pool: Executor,
    on_error: OnError | None,
    on_batch: Callable[[int], None],
) -> np.ndarray:
    """Vectors fp32 [N, D], not normalised, in the order of ``inputs``.

    Args:
        inputs: what to embed; equal ones are embedded once.
        encoder: the model.
        measure: :func:`e5v_jax.encode.inputs.measure` with all but inputs and on_error given.
        cfg: the model's.
        limits: of a batch.
        pool: decodes images.
        on_error: hears of each bad input, whose vector is zero; without it the first one raises.
        on_batch: hears how many inputs each finished batch had.

    Raises:
        InputError: a bad input, by its position.
    """
    positions: dict[Hashable, list[int]] = {}  # of equal inputs
    for position, item in enumerate(inputs):
        positions.setdefault(identity(item), []).append(position)
    groups = list(positions.values())

    def fail(error: InputError, start: int = 0) -> None:
        equal = groups[start + error.position]
        if on_error is None:
            raise InputError(equal[0], error.reason) from error
        for position in equal:
            on_error(InputError(position, error.reason))

    def batches() -> Iterator[Batch]:
        for start in range(0, len(groups), WINDOW):
            window = [inputs[group[0]] for group in groups[start : start + WINDOW]]
            measured = measure(window, partial(fail, start=start))
            yield from plan_batches(
                [replace(item, position=start + item.position) for item in measured],
                max_rows=limits.max_rows,
                max_tokens=limits.max_tokens,
                multiple=encoder.multiple,
            )

    vectors = np.zeros((len(inputs), cfg.text.hidden_size), np.float32)
    for batch, found in encoder.run(_load_ahead(batches(), cfg, pool, fail)):
        for embedded, vector in zip(batch.items, found, strict=True):
            vectors[groups[embedded.position]] = vector
        on_batch(sum(len(groups[embedded.position]) for embedded in batch.items))
    return vectors


def identity(item: Input) -> Hashable:
    """What is the same for inputs that get the same vector; a Pillow image is its object."""
    if isinstance(item, Image.Image):
        return id(item)
    if isinstance(item, Mapping):
        return tuple((key, type(value), identity(value)) for key, value in sorted(item.items()))
    return (type(item), item) if isinstance(item, Hashable) else id(item)


def _load_ahead(
    batches: Iterable[Batch], cfg: ModelConfig, pool: Executor, fail: OnError
) -> Iterator[tuple[Batch, list[Prepared]]]:
    """Batches with their images decoded; items whose image is broken are told and left out."""
    waiting: deque[tuple[Batch, list[Prepared | Future[Prepared]]]] = deque()
    try:
        for batch in batches:
            waiting.append(
                (
                    batch,
                    [
                        pool.submit(load, item, cfg) if batch.tiles else load(item, cfg)
                        for item in batch.items
                    ],
                )
            )
            if len(waiting) > _AHEAD:
                yield from _loaded(*waiting.popleft(), fail)
        while waiting:
            yield from _loaded(*waiting.popleft(), fail)
    finally:
        for _, loading in waiting:
            for future in loading:
                if isinstance(future, Future):
                    future.cancel()


def _loaded(
    batch: Batch, loading: Sequence[Prepared | Future[Prepared]], fail: OnError
) -> Iterator[tuple[Batch, list[Prepared]]]:
    items, prepared = [], []
    for item, future in zip(batch.items, loading, strict=True):
        try:
            ready = future.result() if isinstance(future, Future) else future
        except ValueError as error:
            fail(InputError(item.position, str(error)))
            continue
        items.append(item)
        prepared.append(ready)
    if items:
        yield replace(batch, items=items), prepared
