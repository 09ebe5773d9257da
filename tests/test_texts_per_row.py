"""Texts that share rows: the loss and the gradient of one text a row, for fewer positions."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hf_models import build_text
from test_train_step import (
    RECIPE,
    largest_relative,
    load,
    loss_and_gradients,
    make_pair_batch,
    make_tokens,
    with_random_factors,
)
from training_runs import config, make_folder, read_metrics

from e5v_jax.families.base import Measured, Model, Together
from e5v_jax.nn.layers import LoRAConfig
from e5v_jax.train.batches import PairTokens, common_beginning, group_lengths
from e5v_jax.train.loop import train
from e5v_jax.train.step import PairBatch

BEGINNING = [7, 3, 200, 3]


def columns(*sequences: list[int]) -> list[list[Measured]]:
    return [[Measured(row, ids, len(ids)) for row, ids in enumerate(sequences)]]


@pytest.mark.parametrize(
    ("sequences", "count"),
    [
        ([[1, 2, 3, 4], [1, 2, 9, 4]], 2),
        ([[1, 2, 3, 4], [1, 2, 3, 4]], 3),  # the last is pooled
        ([[1, 2], [1, 2, 3, 4], [1, 2, 5]], 1),
        ([[1, 2, 3], [4, 2, 3]], 0),
        ([[5], [5, 6]], 0),
    ],
)
def test_common_beginning(sequences: list[list[int]], count: int) -> None:
    assert common_beginning(columns(*sequences)) == count


def with_beginning(tokens: PairTokens) -> PairTokens:
    """Every sequence after the same four tokens."""
    items = [[replace(x, ids=BEGINNING + x.ids) for x in column] for column in tokens.items]
    return replace(tokens, items=items, lengths=tokens.lengths + len(BEGINNING))


@pytest.fixture(scope="module")
def tokens() -> PairTokens:
    found = with_beginning(make_tokens(3, rows=8))
    assert common_beginning(found.items) == len(BEGINNING)
    return found


def batch_of(tokens: PairTokens, groups: int) -> PairBatch:
    rows = np.arange(8)
    lengths = group_lengths(tokens.lengths, [rows], groups=groups, multiple=8)
    return make_pair_batch(tokens, rows, lengths=lengths, multiple=8)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return with_random_factors(load(build_text(RECIPE, tmp_path_factory.mktemp("llama"))))


@pytest.fixture(scope="module")
def alone(model: Model, tokens: PairTokens) -> tuple[float, dict[str, np.ndarray]]:
    """One text a row, in one group."""
    return loss_and_gradients(model, batch_of(tokens, 1))


@pytest.mark.parametrize(
    ("texts", "beginning", "groups", "how"),
    [
        (2, 4, 1, {}),
        (8, 4, 3, {"remat": "full"}),
        (4, 4, 1, {"remat": "dots", "chunk_size": 8}),
        (4, 0, 1, {}),
    ],
)
def test_loss_and_gradient_are_those_of_one_text_a_row(
    model: Model,
    tokens: PairTokens,
    alone: tuple[float, dict[str, np.ndarray]],
    texts: int,
    beginning: int,
    groups: int,
    how: dict[str, Any],
) -> None:
    together = Together(texts, beginning)
    loss, gradients = loss_and_gradients(model, batch_of(tokens, groups), together=together, **how)
    assert loss == pytest.approx(alone[0], rel=1e-6)
    assert largest_relative(gradients, alone[1]) <= 1e-5


@pytest.mark.parametrize(
    "mistake",
    [
        lambda packing: packing._replace(segment=np.zeros_like(packing.segment)),  # seen by others
        lambda packing: packing._replace(shift=np.zeros_like(packing.shift)),  # later positions
    ],
)
def test_a_mistake_would_be_seen(
    model: Model,
    tokens: PairTokens,
    alone: tuple[float, dict[str, np.ndarray]],
    mistake: Callable[[Any], Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from e5v_jax.families.text import model as module

    right = module.Packing
    monkeypatch.setattr(module, "Packing", lambda *arrays: mistake(right(*arrays)))
    loss, _ = loss_and_gradients(model, batch_of(tokens, 1), together=Together(2, 4))
    assert abs(loss / alone[0] - 1) > 1e-3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("run"))


def test_a_run_is_that_of_one_text_a_row(folder: Path) -> None:
    """From the command's configuration: the beginning is found in the data."""
    plain = LoRAConfig(rank=2, alpha=4.0, dropout=0.0)
    losses = []
    for texts in (1, 4):
        output = folder / f"texts-{texts}"
        train(config(folder, output, lora=plain, max_steps=4, texts_per_row=texts))
        losses.append([line["loss"] for line in read_metrics(output)])
    assert len(losses[0]) == 4
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[0] != losses[1]  # by rounding: else it were the same program


def test_chunks_hold_whole_rows(folder: Path) -> None:
    cfg = config(folder, folder / "refused", texts_per_row=4, chunk_size=6)
    with pytest.raises(ValueError, match=r"chunk_size 6 .* rows of 4 texts: make it a multiple of"):
        train(cfg)
    assert not (folder / "refused").exists()
