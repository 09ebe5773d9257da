"""What embedding trainers add to InfoNCE, against plain PyTorch written out anchor by anchor."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from test_loss import relative, unit_vectors

from e5v_jax.train.loss import contrastive_loss

TEMPERATURE, COUNT, WIDTH = 0.05, 6, 64


def texts(columns: int) -> np.ndarray:
    """Numbers of the texts, all different but for three false negatives."""
    numbers = np.arange(columns * COUNT)
    numbers[COUNT + 3] = numbers[0]  # row 3's positive is row 0's anchor
    numbers[COUNT + 4] = numbers[COUNT + 1]  # row 4 and row 1 share their positive
    if columns == 3:
        numbers[2 * COUNT + 5] = numbers[COUNT + 2]  # row 5's hard negative is row 2's positive
    return numbers.astype(np.int32)


def expected_loss(
    vectors: torch.Tensor,
    columns: int,
    *,
    dims: tuple[int, ...],
    bidirectional: bool,
    numbers: np.ndarray | None,
) -> torch.Tensor:
    """Each anchor's log-softmax over the candidates that are left, by loops."""
    losses = []
    for dim in (*dims, vectors.shape[1]):
        unit = torch.nn.functional.normalize(vectors[:, :dim])
        directions = [one_way(unit, columns, numbers)]
        if bidirectional:
            order = [*range(COUNT, 2 * COUNT), *range(COUNT)]  # positives look for their anchors
            swapped = None if numbers is None else numbers[order]
            directions.append(one_way(unit[order], 2, swapped, of=numbers))
        losses.append(torch.stack(directions).mean())
    return torch.stack(losses).mean()


def one_way(
    unit: torch.Tensor, columns: int, numbers: np.ndarray | None, of: np.ndarray | None = None
) -> torch.Tensor:
    """With ``of`` (backwards) candidate j is left out if its own pair holds one of i's texts."""
    losses = []
    for i in range(COUNT):
        terms = []
        for j in range((columns - 1) * COUNT):
            if numbers is not None and j != i:
                if of is None:
                    left_out = numbers[COUNT + j] in (numbers[i], numbers[COUNT + i])
                else:
                    left_out = of[COUNT + i] in (of[j], of[COUNT + j])
                if left_out:
                    continue
            terms.append(unit[i] @ unit[COUNT + j] / TEMPERATURE)
        own = unit[i] @ unit[COUNT + i] / TEMPERATURE
        losses.append(torch.logsumexp(torch.stack(terms), 0) - own)
    return torch.stack(losses).mean()


@pytest.mark.parametrize("columns", [2, 3], ids=["pairs", "triplets"])
@pytest.mark.parametrize(
    ("dims", "bidirectional", "mask"),
    [
        ((), False, False),
        ((8, 24), False, False),
        ((), True, False),
        ((), False, True),
        ((16,), True, True),
    ],
    ids=["plain", "matryoshka", "bidirectional", "masked", "all"],
)
def test_options_equal_pytorch(
    columns: int, dims: tuple[int, ...], bidirectional: bool, mask: bool
) -> None:
    vectors = np.concatenate(unit_vectors(COUNT, columns, seed=3, width=WIDTH))
    vectors *= np.random.default_rng(4).uniform(0.5, 2, size=(len(vectors), 1)).astype(np.float32)
    numbers = texts(columns) if mask else None

    def ours(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return contrastive_loss(
            x,
            columns=columns,
            temperature=TEMPERATURE,
            text_ids=None if numbers is None else jnp.asarray(numbers),
            matryoshka_dims=dims,
            bidirectional=bidirectional,
        )

    (value, _), gradient = jax.jit(jax.value_and_grad(ours, has_aux=True))(vectors)
    leaf = torch.tensor(vectors, dtype=torch.float64, requires_grad=True)
    expected = expected_loss(leaf, columns, dims=dims, bidirectional=bidirectional, numbers=numbers)
    expected.backward()  # type: ignore[no-untyped-call]  # torch's
    assert float(value) == pytest.approx(float(expected.detach()), rel=1e-6)
    assert leaf.grad is not None
    assert relative(np.asarray(gradient), leaf.grad.numpy()) <= 1e-6


@pytest.mark.parametrize("columns", [2, 3])
def test_each_option_changes_the_loss(columns: int) -> None:
    vectors = jnp.asarray(np.concatenate(unit_vectors(COUNT, columns, seed=3, width=WIDTH)))
    common = {"columns": columns, "temperature": TEMPERATURE}
    values = [
        float(contrastive_loss(vectors, **common, **options).loss)
        for options in (
            {},
            {"matryoshka_dims": (8,)},
            {"bidirectional": True},
            {"text_ids": jnp.asarray(texts(columns))},
        )
    ]
    assert len({round(value, 4) for value in values}) == 4
