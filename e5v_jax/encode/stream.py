"""Inputs to vectors: distinct ones in windows, batches of similar length, images decoded ahead."""

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakSet

import numpy as np
from flax import nnx
from PIL import Image

from e5v_jax.data.inputs import Input, InputError, split_modalities
from e5v_jax.encode.batching import Batch, plan_batches
from e5v_jax.encode.encoder import Encoder, delayed
from e5v_jax.encode.vectors import find_unusable
from e5v_jax.families.base import Measured
from e5v_jax.prompts import PromptChoice

WINDOW = 8192  # inputs that are tokenised, measured and sorted at a time
_AHEAD = 8  # batches whose images are being decoded while the device works
_ATTEMPTS = 3  # to decode an image: another one may have killed the process that they shared
# Of a batch, by platform. On a CPU, the activations of more leave the caches.
MAX_TOKENS = {"cpu": 1024, "gpu": 16384, "tpu": 16384}

_REMEDY = "is the model whole? Where float16 overflows, choose bfloat16 or float32"

OnError = Callable[[InputError], None]


@dataclass(frozen=True)
class BatchLimits:
    """The size of a device batch."""

    max_rows: int | None = None
    max_tokens: int | None = None  # None is 1024 on a CPU, 16384 on a GPU or TPU


def encode_stream(
    encoder: Encoder,
    state: nnx.State,
    inputs: Sequence[Input],
    *,
    prompts: PromptChoice,
    limits: BatchLimits,
    pool: Executor,
    on_error: OnError | None = None,
    on_batch: Callable[[int], None] = lambda done: None,
    on_truncate: Callable[[int], None] = lambda position: None,
    truncate_dim: int | None = None,
) -> np.ndarray:
    """Embed ``inputs``, equal ones once, as fp32 [N, D], not normalised, in their order.

    Where ``prompts`` say so, an input with text and image is the sum of two vectors.
    ``state`` has the parameters of the model. ``on_error`` hears of each bad input, whose vector is
    zero; without it the first one raises. An input that the model gives no finite vector or a zero
    one is bad, too. ``on_batch`` hears how many inputs each batch finished, ``on_truncate`` the
    position of each whose text was cut. ``pool`` decodes images. ``truncate_dim`` keeps the first
    dimensions.

    Raises InputError: a bad input, by its position.
    """
    processor, runtime = encoder.processor, encoder.runtime
    max_tokens = limits.max_tokens or MAX_TOKENS[runtime.platform]
    parts: dict[Hashable, tuple[Input, list[int]]] = {}  # what is embedded, and of which inputs
    missing = [0] * len(inputs)  # parts of each
    for position, item in enumerate(inputs):
        for part in split_modalities(item) if prompts.adds else (item,):
            parts.setdefault(identity(part), (part, []))[1].append(position)
            missing[position] += 1
    groups = list(parts.values())
    bad: set[int] = set()

    def fail(error: InputError, start: int = 0) -> None:
        _, equal = groups[start + error.position]
        if on_error is None:
            raise InputError(equal[0], error.reason) from error
        for position in (position for position in equal if position not in bad):
            bad.add(position)
            on_error(InputError(position, error.reason))

    def batches() -> Iterator[Batch]:
        for start in range(0, len(groups), WINDOW):
            window = [part for part, _ in groups[start : start + WINDOW]]
            measured = processor.measure(window, prompts, on_error=partial(fail, start=start))
            for item in measured:
                for position in groups[start + item.position][1] if item.truncated else ():
                    on_truncate(position)
            yield from plan_batches(
                [replace(item, position=start + item.position) for item in measured],
                padded_length=processor.padded_length,
                max_rows=limits.max_rows,
                max_tokens=max_tokens,
                multiple=runtime.batch_devices,
            )

    dimensions = truncate_dim or processor.config.text.hidden_size
    vectors = np.zeros((len(inputs), dimensions), np.float32)
    for batch, found in encoder.run(state, _load_ahead(batches(), processor.load, pool, fail)):
        kept = dict(enumerate(zip(batch.items, found[:, :dimensions], strict=True)))
        for row in find_unusable(found[:, :dimensions]):
            embedded, vector = kept.pop(row)
            flaw = "of no length" if np.abs(vector).max() < 1 else "not finite"
            fail(_error(embedded, f"its vector is {flaw}: {_REMEDY}"))
        finished = 0
        for embedded, vector in kept.values():
            for position in groups[embedded.position][1]:
                vectors[position] += vector
                missing[position] -= 1
                finished += missing[position] == 0
        on_batch(finished)
    vectors[list(bad)] = 0
    return vectors


def identity(item: Input) -> Hashable:
    """Tell what equal inputs have in common; a Pillow image is its object."""
    if isinstance(item, Image.Image):
        return id(item)
    if isinstance(item, Mapping):
        return tuple((key, type(value), identity(value)) for key, value in sorted(item.items()))
    return (type(item), item) if isinstance(item, Hashable) else id(item)


def _load_ahead(
    batches: Iterable[Batch], load: Callable[[Measured], Any], pool: Executor, fail: OnError
) -> Iterator[tuple[Batch, list[Any]]]:
    """Yield batches with their images decoded, without the items whose image is broken."""
    decoding: WeakSet[Future[Any]] = WeakSet()  # those that are waited for

    def submit(item: Measured) -> Any:
        if item.image is None:
            return load(item)
        future = pool.submit(load, item)
        decoding.add(future)
        return future

    def finish(item: Measured, loaded: Any) -> Any:
        for attempt in range(_ATTEMPTS):
            if attempt:
                loaded = submit(item)
            with suppress(BrokenExecutor):
                return loaded.result() if isinstance(loaded, Future) else loaded
        reason = f"{_ATTEMPTS} processes that were to decode it were killed: is memory short?"
        raise _error(item, reason)

    started = ((batch, [submit(item) for item in batch.items]) for batch in batches)
    try:
        for batch, loading in delayed(started, _AHEAD):
            items, prepared = [], []
            for item, loaded in zip(batch.items, loading, strict=True):
                try:
                    prepared.append(finish(item, loaded))
                    items.append(item)
                except InputError as error:
                    fail(error)
                except ValueError as error:  # of the image, and names it
                    fail(InputError(item.position, str(error)))
            if items:
                yield replace(batch, items=items), prepared
    finally:
        for future in decoding:
            future.cancel()


def _error(item: Measured, reason: str) -> InputError:
    """Make the error of an input, with the name of its image if that is a file."""
    if isinstance(item.image, str | Path):
        reason = f"{item.image}: {reason}"
    return InputError(item.position, reason)
