"""Batches: deterministic, checkpointable, sliced by process, no premise twice."""

import json
import time
from pathlib import Path

import numpy as np
import pytest

from e5v_jax.data.pairs import Side, TrainingPairs, load_pairs
from e5v_jax.data.pipeline import (
    Rows,
    batches_per_epoch,
    epoch_order,
    make_batches,
    number_inputs,
)


def number_texts(texts: list[str]) -> Rows:
    return number_inputs([Side("", texts, None)])


def triplets_of(premises: list[str]) -> TrainingPairs:
    return TrainingPairs(
        sides=(
            Side("sent0", premises, None),
            Side("sent1", ["positive"] * len(premises), None),
        ),
        row_ids=[f"f:{i + 1}" for i in range(len(premises))],
        fingerprint="",
    )


PREMISES = [f"premise {i // 3}" for i in range(100)]
THREES = triplets_of(PREMISES)  # each premise three times


def check_order(ids: Rows, batch_size: int, seed: int = 0, epoch: int = 0) -> Rows:
    """The order, after checking what must hold of every one."""
    order = epoch_order(ids, batch_size, seed, epoch)
    assert order.dtype == np.int64
    assert order.shape == (batches_per_epoch(ids, batch_size), batch_size)
    assert len(np.unique(order)) == order.size  # no row twice
    assert all(len(set(premises)) == batch_size for premises in ids[order].tolist())
    return order


def test_number_texts() -> None:
    ids = number_texts(["A dog.", " a DOG. ", "Straße", "STRASSE", "a dog"])
    assert ids.tolist() == [0, 0, 1, 1, 2]
    assert ids.dtype == np.int64


def most_batches(counts: list[int], batch_size: int) -> int:
    """By exhaustion: always filling a batch from the premises with most rows left is optimal."""
    batches = 0
    while True:
        counts = sorted((c for c in counts if c), reverse=True)
        if len(counts) < batch_size:
            return batches
        counts = [c - (i < batch_size) for i, c in enumerate(counts)]
        batches += 1


def test_no_premise_twice_whatever_the_data() -> None:
    random = np.random.default_rng(0)
    unequal = 0
    for case in range(300):
        counts = random.integers(1, [2, 4, 12, 40][case % 4], size=random.integers(1, 30))
        ids = random.permutation(np.repeat(np.arange(len(counts)), counts))
        batch_size = int(random.integers(1, len(counts) + 2))
        order = check_order(ids, batch_size, seed=case)
        assert len(order) == most_batches(counts.tolist(), batch_size)
        unequal += len(order) < len(ids) // batch_size
    assert 30 < unequal < 270  # both kinds of data were tried


@pytest.mark.parametrize("batch_size", [2, 24, 33])
def test_every_row_once_per_epoch(batch_size: int) -> None:
    # 34 premises, so 33 of 34 in each batch is as tight as it gets
    ids = number_texts(PREMISES)
    left_out = set()
    for epoch in range(3):
        order = check_order(ids, batch_size, epoch=epoch)
        assert order.size == 100 // batch_size * batch_size
        left_out.add(tuple(sorted(set(range(100)) - set(order.reshape(-1).tolist()))))
    assert len(left_out) == (1 if 100 % batch_size == 0 else 3)


def test_order_is_a_shuffle_of_seed_and_epoch() -> None:
    ids = np.arange(1000) // 3
    orders = [epoch_order(ids, 10, seed, epoch) for seed in range(3) for epoch in range(3)]
    flat = {tuple(order.reshape(-1).tolist()) for order in orders}
    assert len(flat) == 9
    for order in orders:
        position = np.empty(1000)
        position[order.reshape(-1)] = np.arange(1000)
        assert abs(np.corrcoef(position, np.arange(1000))[0, 1]) < 0.15
    assert np.array_equal(orders[4], epoch_order(ids, 10, 1, 1))


def test_order_is_pinned() -> None:
    # a changed order would change what every resumed run sees
    assert epoch_order(np.arange(8), 4, 42, 0).tolist() == [[0, 1, 4, 2], [6, 5, 7, 3]]
    assert epoch_order(np.arange(8) // 2, 4, 42, 1).tolist() == [[7, 3, 4, 1], [5, 6, 0, 2]]


def test_batches_cover_each_epoch_in_order() -> None:
    batches = list(make_batches(THREES, batch_size=12, seed=7, num_epochs=3))
    assert len(batches) == 3 * 8
    assert all(batch.dtype == np.int64 and batch.shape == (12,) for batch in batches)
    ids = number_texts(PREMISES)
    expected = np.concatenate([epoch_order(ids, 12, 7, epoch) for epoch in range(3)])
    assert np.array_equal(np.stack(batches), expected)


@pytest.mark.parametrize("taken", [0, 1, 7, 8, 9, 15, 16])
def test_resume_yields_the_remaining_batches(taken: int) -> None:
    whole = list(make_batches(THREES, batch_size=12, seed=7, num_epochs=2))
    first = make_batches(THREES, batch_size=12, seed=7, num_epochs=2)
    for _ in range(taken):
        next(first)
    state = json.loads(json.dumps(first.get_state()))
    resumed = make_batches(THREES, batch_size=12, seed=7, num_epochs=2)
    if taken % 2:
        next(resumed)  # batches already fetched ahead must not come through
    resumed.set_state(state)
    rest = list(resumed)
    assert len(rest) == 16 - taken
    assert all(np.array_equal(a, b) for a, b in zip(rest, whole[taken:], strict=True))


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_processes_share_the_same_global_batches(processes: int) -> None:
    whole = np.stack(list(make_batches(THREES, batch_size=12, seed=1, num_epochs=2)))
    parts = [
        np.stack(
            list(
                make_batches(
                    THREES,
                    batch_size=12,
                    seed=1,
                    num_epochs=2,
                    process_index=index,
                    process_count=processes,
                )
            )
        )
        for index in range(processes)
    ]
    assert all(part.shape == (16, 12 // processes) for part in parts)
    assert np.array_equal(np.concatenate(parts, axis=1), whole)


def test_resume_with_another_number_of_processes() -> None:
    whole = list(make_batches(THREES, batch_size=12, seed=1, num_epochs=1))
    one = make_batches(THREES, batch_size=12, seed=1, num_epochs=1)
    next(one), next(one)
    two = make_batches(
        THREES, batch_size=12, seed=1, num_epochs=1, process_index=1, process_count=2
    )
    two.set_state(one.get_state())
    assert np.array_equal(next(two), whole[2][6:])


def test_transform_gets_the_rows_and_may_fail() -> None:
    def sentences(rows: Rows) -> tuple[Rows, list[str]]:
        return rows, [PREMISES[row] for row in rows]

    plain = make_batches(THREES, batch_size=12, seed=1, num_epochs=1)
    batches = make_batches(THREES, batch_size=12, seed=1, num_epochs=1, transform=sentences)
    for expected, (rows, texts) in zip(plain, batches, strict=True):
        assert np.array_equal(rows, expected)
        assert texts == [PREMISES[row] for row in expected]

    def fails(rows: Rows) -> Rows:
        if rows[0] == third[0]:
            raise ValueError("f:3: bad row")
        return rows

    third = list(make_batches(THREES, batch_size=12, seed=1, num_epochs=1))[2]
    failing = make_batches(THREES, batch_size=12, seed=1, num_epochs=2, transform=fails)
    next(failing), next(failing)
    with pytest.raises(ValueError) as info:
        next(failing)
    assert str(info.value) == "f:3: bad row"


def test_rows_are_the_transforms_own() -> None:
    def overwrites(rows: Rows) -> Rows:
        taken = rows.copy()
        rows[:] = -1
        return taken

    batches = make_batches(THREES, batch_size=12, seed=1, num_epochs=1, transform=overwrites)
    start = batches.get_state()
    first = next(batches)
    batches.set_state(start)
    assert np.array_equal(next(batches), first)


def test_uneven_data_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    uneven = triplets_of([f"p{i}" for i in range(40)] + ["Same."] * 30 + ["same. "] * 30)
    batches = list(make_batches(uneven, batch_size=10, seed=0, num_epochs=2))
    assert len(batches) == 2 * 4  # 4 batches: 36 of the others and one "same" in each
    assert caplog.messages == [
        "60 of 100 rows are left out of each epoch, other ones each time: a batch takes a sent0 "
        "once, but 60 rows have the same as f:41"
    ]
    caplog.clear()
    make_batches(THREES, batch_size=12, seed=0, num_epochs=1)
    assert not caplog.messages


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"batch_size": 0}, "batch_size 0, num_epochs 1, seed 0: expected at least 1, 1 and 0"),
        ({"num_epochs": 0}, "batch_size 10, num_epochs 0"),
        ({"seed": -1}, "batch_size 10, num_epochs 1, seed -1"),
        ({"process_count": 3}, "batch_size 10 is no multiple of 3 processes"),
        ({"process_index": 2, "process_count": 2}, "process_index 2, expected 0 to 1"),
        ({"batch_size": 101}, "100 rows with 34 different sent0 do not fill a batch of 101"),
        ({"batch_size": 35}, "100 rows with 34 different sent0 do not fill a batch of 35 without"),
    ],
)
def test_bad_arguments(changed: dict[str, int], message: str) -> None:
    arguments = {"batch_size": 10, "seed": 0, "num_epochs": 1} | changed
    with pytest.raises(ValueError, match=f"^{message}"):
        make_batches(THREES, **arguments)  # type: ignore[call-overload]  # one dict for all


def test_shared_triplets_have_no_premise_twice(shared: Path) -> None:
    triplets = load_pairs(shared / "data/nli/triplets.csv")
    sent0 = triplets.sides[0].texts
    assert sent0 is not None
    for batches in (
        make_batches(triplets, batch_size=768, seed=42, num_epochs=2),
        make_batches(triplets, batch_size=24, seed=42, num_epochs=1),
    ):
        seen = []
        for rows in batches:
            premises = {sent0[row].strip().casefold() for row in rows}
            assert len(premises) == len(rows)
            seen.extend(rows.tolist())
        per_epoch = 17_188 // len(rows) * len(rows)
        for start in range(0, len(seen), per_epoch):
            assert len(set(seen[start : start + per_epoch])) == per_epoch


def test_size_of_the_paper_takes_a_moment() -> None:
    ids = np.arange(275_601) // 3
    start = time.process_time()
    check_order(ids, 768)
    assert time.process_time() - start < 5  # 0.2 s alone on a core
