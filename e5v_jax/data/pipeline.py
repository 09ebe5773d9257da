"""Deterministic batches of row numbers: shuffled, sliced by process, checkpointable (Grain)."""

import logging
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import grain
import numpy as np
from numpy.typing import NDArray

from e5v_jax.data.pairs import Side, TrainingPairs

Rows = NDArray[np.int64]
T_co = TypeVar("T_co", covariant=True)
_logger = logging.getLogger(__name__)


class BatchIterator(Iterator[T_co], Protocol[T_co]):
    """The part of ``grain.DatasetIterator`` that training uses."""

    def get_state(self) -> dict[str, Any]:
        """The position in the data, fit for json: how many batches were taken."""

    def set_state(self, state: dict[str, Any]) -> None:
        """Go to a position: the next batch is the one after those taken then."""


def number_inputs(sides: Sequence[Side]) -> Rows:
    """Number the inputs of all sides, int64 [sum of N]: equal if text and path of the image are."""
    numbers: dict[tuple[str, Path | None], int] = {}
    found = []
    for side in sides:
        texts = side.texts or [""] * len(side)
        images: Sequence[Path | None] = side.images or [None] * len(side)
        for text, image in zip(texts, images, strict=True):
            found.append(numbers.setdefault((text.strip().casefold(), image), len(numbers)))
    return np.array(found, np.int64)


def batches_per_epoch(premise_ids: Rows, batch_size: int) -> int:
    """Count the most batches of ``batch_size`` rows in which no premise is there twice.

    That is N // batch_size unless a few premises have many of the N rows. m batches can be had
    exactly if sum(min(count, m)) >= m * batch_size over all premises, since a batch takes at most
    one row of each; :func:`epoch_order` shows that this is enough.
    """
    counts = np.unique(premise_ids, return_counts=True)[1]  # [premises]
    candidates = range(1, len(premise_ids) // batch_size + 1)
    return bisect_left(  # if m is too many, so is m + 1: the sum is concave in m
        candidates, True, key=lambda m: bool(np.minimum(counts, m).sum() < m * batch_size)
    )


def epoch_order(premise_ids: Rows, batch_size: int, seed: int, epoch: int) -> Rows:
    """The batches of one epoch: a shuffle in which no batch has the same premise twice.

    It turns int64 [N] of :func:`number_inputs` into row numbers int64 [batches_per_epoch, B], the
    same on every machine. No row is there twice. Those that are not there are the remainder: N
    modulo ``batch_size`` of them, other ones each epoch, or more if a premise has more rows than
    there are batches (:func:`batches_per_epoch`). ``seed`` and ``epoch`` are not negative.
    """
    n, m = len(premise_ids), batches_per_epoch(premise_ids, batch_size)
    # Raw bits of a bit generator, because NumPy may change Generator.permutation in any version.
    random = np.random.Philox(np.random.SeedSequence([seed, epoch]))
    shuffled = np.argsort(random.random_raw(n), kind="stable")  # [N]

    # At most m rows of each premise, the first ones in shuffled order, then m * B in all.
    by_premise = np.argsort(premise_ids[shuffled], kind="stable")
    rank = np.empty(n, np.int64)  # [N], how many rows of the premise come earlier
    rank[by_premise] = _ranks(premise_ids[shuffled][by_premise])
    kept = shuffled[rank < m][: m * batch_size]  # [m * B]

    # The shuffle is the batches, except for the rows that are a premise's second in their batch.
    batch_of = np.arange(m * batch_size) // batch_size
    keys = batch_of * n + premise_ids[kept]  # equal: same batch and premise
    by_key = np.argsort(keys, kind="stable")
    repeated = by_key[_ranks(keys[by_key]) > 0]
    order = kept.reshape(m, batch_size)  # [m, B]
    return _place_elsewhere(order, np.sort(repeated), premise_ids, random)


def _ranks(sorted_keys: Rows) -> Rows:
    """Tell each element's position within its run of equal keys, int64 [N]."""
    starts = np.flatnonzero(np.diff(sorted_keys, prepend=-1))
    return np.arange(len(sorted_keys)) - np.repeat(starts, np.diff(starts, append=len(sorted_keys)))


def _place_elsewhere(
    order: Rows, repeated: Rows, premise_ids: Rows, random: np.random.Philox
) -> Rows:
    """Move the rows at the flat positions ``repeated`` so that no batch repeats a premise.

    Those positions become holes. Then one row after the other (premise p) goes to a hole in some
    batch b. If b has p already, another batch c has not: p has at most as many rows as there are
    batches, and one of them is in hand. If c has a hole, the row goes there. If not, c has more
    premises than b, so one of its rows can go to b and make room. So this never fails.
    """
    if not len(repeated):
        return order
    batches, size = order.shape
    premise_of = premise_ids.tolist()  # Python lists: single elements of arrays are slow to reach
    premises = [set(batch) for batch in premise_ids[order].tolist()]
    holes: dict[int, list[int]] = {}  # batch -> columns
    for batch, column in zip(*(x.tolist() for x in np.divmod(repeated, size)), strict=True):
        holes.setdefault(batch, []).append(column)
    in_hand = order.reshape(-1)[repeated]
    in_hand = in_hand[np.argsort(random.random_raw(len(in_hand)), kind="stable")]
    table: list[list[int]] = order.tolist()

    def from_anywhere(count: int) -> Iterator[int]:
        """Count from a random number below ``count`` to the last, then on from 0."""
        start = int(random.random_raw()) % count
        return (i % count for i in range(start, start + count))

    for row in in_hand.tolist():
        premise = premise_of[row]
        b = next(iter(holes))
        if premise in premises[b]:
            c = next(i for i in from_anywhere(batches) if premise not in premises[i])
            if c in holes:
                b = c
            else:
                column = next(
                    j for j in from_anywhere(size) if premise_of[table[c][j]] not in premises[b]
                )
                row, table[c][column] = table[c][column], row
                premises[c].add(premise)
                premise = premise_of[row]
                premises[c].remove(premise)
        table[b][holes[b].pop()] = row
        premises[b].add(premise)
        if not holes[b]:
            del holes[b]
    return np.array(table, np.int64)


def make_batches(
    pairs: TrainingPairs,
    *,
    batch_size: int,
    seed: int,
    num_epochs: int,
    process_index: int = 0,
    process_count: int = 1,
    transform: Callable[[Rows], Any] = lambda rows: rows,
) -> BatchIterator[Any]:
    """Give this process's part of each global batch of pairs: see :func:`batches_of_rows`.

    A batch takes an anchor once; ``transform`` is not told the epoch.
    """
    return batches_of_rows(
        number_inputs(pairs.sides[:1]),
        pairs.row_ids,
        pairs.sides[0].column,
        batch_size=batch_size,
        seed=seed,
        num_epochs=num_epochs,
        process_index=process_index,
        process_count=process_count,
        transform=lambda rows, epoch: transform(rows),
    )


def batches_of_rows(
    premises: Rows,
    row_ids: Sequence[str],
    column: str,
    *,
    batch_size: int,
    seed: int,
    num_epochs: int,
    process_index: int = 0,
    process_count: int = 1,
    transform: Callable[[Rows, int], Any],
) -> BatchIterator[Any]:
    """Give this process's part of each global batch, as what becomes of its row numbers.

    A batch takes one row of each of ``premises`` int64 [N] (:func:`number_inputs`), which messages
    call ``column``.

    Rows are shuffled anew each epoch, see :func:`epoch_order`; the global batches depend on
    ``seed`` and the data, not on the number of processes. The state is the number of batches taken,
    so a run may resume with other processes. It says nothing of the data: resume with the same
    pairs (``TrainingPairs.fingerprint``), batch_size and seed.

    ``batch_size`` is that of a global batch, of which each process takes an equal run of columns.
    ``transform`` is called with int64 [batch_size / process_count] row numbers and the epoch, in a
    thread and a few batches ahead. What it raises, ``next`` raises. It must not return None.

    Raises ValueError: one line: a number out of range, or not one batch can be formed.
    """
    if batch_size < 1 or num_epochs < 1 or seed < 0:
        found = f"batch_size {batch_size}, num_epochs {num_epochs}, seed {seed}"
        raise ValueError(f"{found}: expected at least 1, 1 and 0")
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index {process_index}, expected 0 to {process_count - 1}")
    if batch_size % process_count:
        raise ValueError(f"batch_size {batch_size} is no multiple of {process_count} processes")
    per_epoch = batches_per_epoch(premises, batch_size)
    used = per_epoch * batch_size
    if not used:
        raise ValueError(
            f"{len(premises)} rows with {len(np.unique(premises))} different "
            f"{column} do not fill a batch of {batch_size} without repeating "
            "one: lower batch_size or add data"
        )
    if used < len(premises) // batch_size * batch_size:
        commonest = int(np.argmax(np.bincount(premises)))
        _logger.warning(
            "%d of %d rows are left out of each epoch, other ones each time: a batch takes a %s "
            "once, but %d rows have the same as %s",
            len(premises) - used,
            len(premises),
            column,
            np.count_nonzero(premises == commonest),
            row_ids[int(np.argmax(premises == commonest))],
        )
    share = batch_size // process_count
    columns = slice(process_index * share, (process_index + 1) * share)
    order_of = lru_cache(maxsize=1)(partial(epoch_order, premises, batch_size, seed))

    def batch(step: int) -> Any:
        epoch, number = divmod(step, per_epoch)
        return transform(order_of(epoch)[number, columns].copy(), epoch)

    # One thread: the rows are in memory, and the order of one epoch is made once.
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    steps = grain.MapDataset.range(num_epochs * per_epoch)
    return iter(steps.map(batch).to_iter_dataset(options))
