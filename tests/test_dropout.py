"""Dropout's hash: as random as its users need, and the same wherever it is computed."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e5v_jax.nn.layers import dropout

ROWS, COLUMNS = 1024, 768


def mask(key: jax.Array, rate: float, shape: tuple[int, int] = (ROWS, COLUMNS)) -> np.ndarray:
    """1.0 where an entry is dropped."""
    return np.asarray(dropout(jnp.ones(shape), rate, key) == 0, np.float64)


def keys_of_a_run() -> list[jax.Array]:
    """Those of 4 steps, 4 layers, 7 linear maps, derived as the training loop and decoder do."""
    found = []
    for step in range(4):
        of_step = jax.random.fold_in(jax.random.key(0), step)
        for of_layer in jax.random.split(of_step, 4):
            found += list(jax.random.split(of_layer, 7))
    return found


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.5, 0.9])
def test_drops_its_rate_and_keeps_the_mean(rate: float) -> None:
    dropped = np.stack([mask(key, rate) for key in keys_of_a_run()[:16]])
    deviation = np.sqrt(rate * (1 - rate))
    # of everything, each mask, each row and each column, in standard errors
    for axes in ((0, 1, 2), (1, 2), (0, 2), (0, 1)):
        count = np.prod([dropped.shape[axis] for axis in axes])
        errors = (dropped.mean(axes) - rate) / deviation * np.sqrt(count)
        assert np.abs(errors).max() < 5.5
        if errors.size > 500:  # neither too even nor too uneven: chi-squared per degree of freedom
            assert 0.8 < np.mean(np.square(errors)) < 1.2
    kept = np.asarray(dropout(jnp.full((ROWS, COLUMNS), 3.0), rate, jax.random.key(5)))
    np.testing.assert_allclose(np.unique(kept), [0, 3 / (1 - rate)], rtol=1e-6)


def test_masks_of_steps_layers_and_maps_are_independent() -> None:
    masks = [mask(key, 0.5).ravel() - 0.5 for key in keys_of_a_run()[::3]]
    correlations = [4 * float(np.mean(a * b)) for a, b in itertools.combinations(masks, 2)]
    standard = np.array(correlations) * np.sqrt(ROWS * COLUMNS)
    assert np.abs(standard).max() < 5.5
    assert 0.9 < standard.std() < 1.1


def test_entries_are_independent_of_their_neighbours() -> None:
    centred = mask(jax.random.key(1), 0.5, (4096, 1536)) - 0.5
    distances = [(0, 1), (1, 0), (1, 1), (0, 2), (2, 0), (0, 64), (64, 0), (0, 768), (2048, 0)]
    for down, right in distances:
        a = centred[down:, right:]
        b = centred[: len(centred) - down, : centred.shape[1] - right]
        assert abs(4 * np.mean(a * b)) * np.sqrt(a.size) < 5


def test_is_the_same_in_every_program() -> None:
    """And on every mesh: tests/mesh_shapes.py and tests/test_fault_tolerance.py drop, too."""
    x, key = jnp.arange(64 * 32, dtype=jnp.float32).reshape(64, 32) + 1, jax.random.key(2)
    expected = np.asarray(dropout(x, 0.3, key))
    program = jax.jit(dropout, static_argnums=1)
    np.testing.assert_array_equal(np.asarray(program(x, 0.3, key)), expected)
    longer = program(jnp.concatenate([x, x]), 0.3, key)  # a row's own entries stay what they were
    np.testing.assert_array_equal(np.asarray(longer)[:64], expected)
