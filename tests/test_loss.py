"""InfoNCE against plain PyTorch: loss, gradients and accuracy."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from e5v_jax.train.loss import info_nce

TEMPERATURE = 0.05


def unit_vectors(count: int, columns: int, seed: int, width: int = 64) -> list[np.ndarray]:
    """fp32 [count, width] per column; cosines to the anchor of about 0.1.

    So the loss is about 1 and not next to 0, where a relative error of 1e-6 means nothing in fp32.
    """
    rng = np.random.default_rng(seed)
    anchor = rng.normal(size=(count, width))
    noise = (0.0, 8.0, 12.0)[:columns]
    vectors = [anchor + scale * rng.normal(size=anchor.shape) for scale in noise]
    return [(x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32) for x in vectors]


def torch_info_nce(parts: list[torch.Tensor]) -> tuple[torch.Tensor, float]:
    """The sum written out, one anchor after the other."""
    anchor, candidates = parts[0], [row for part in parts[1:] for row in part]
    losses, hits = [], 0
    for i, row in enumerate(anchor):
        scores = torch.stack([row @ candidate / TEMPERATURE for candidate in candidates])
        losses.append(torch.log(torch.exp(scores - scores[i]).sum()))
        hits += int(scores.argmax()) == i
    return torch.stack(losses).mean(), hits / len(anchor)


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def ours(vectors: list[np.ndarray]) -> tuple[float, float, list[np.ndarray]]:
    """Loss, accuracy and the gradient of each part, under jit."""

    def loss(parts: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
        return info_nce(
            parts[0],
            parts[1],
            parts[2] if len(parts) == 3 else None,
            temperature=TEMPERATURE,
        )

    call = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, accuracy), gradients = call([jnp.asarray(x) for x in vectors])
    assert value.dtype == accuracy.dtype == jnp.float32
    assert value.shape == accuracy.shape == ()
    return float(value), float(accuracy), [np.asarray(g) for g in gradients]


@pytest.mark.parametrize("columns", [2, 3], ids=["pairs", "triplets"])
@pytest.mark.parametrize("count", [1, 2, 7, 48])
def test_equals_pytorch(count: int, columns: int) -> None:
    vectors = unit_vectors(count, columns, seed=count + 5)
    value, accuracy, gradients = ours(vectors)

    leaves = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in vectors]
    expected, expected_accuracy = torch_info_nce(leaves)
    expected.backward()  # type: ignore[no-untyped-call]  # torch's
    assert accuracy == pytest.approx(expected_accuracy, abs=1e-7)
    if count == 1 and columns == 2:  # nothing to tell apart
        assert (value, float(np.abs(gradients[0]).max())) == (0.0, 0.0)
        return
    assert value == pytest.approx(float(expected.detach()), rel=1e-6)
    for mine, leaf in zip(gradients, leaves, strict=True):
        assert leaf.grad is not None
        assert relative(mine, leaf.grad.numpy()) <= 1e-6


def test_candidates_are_all_positives_and_all_hard_negatives() -> None:
    """Equal cosines everywhere: the loss is the log of the number of candidates."""
    same = np.tile(np.eye(1, 8, dtype=np.float32), (5, 1))
    assert ours([same, same])[0] == pytest.approx(np.log(5), rel=1e-6)
    assert ours([same, same, same])[0] == pytest.approx(np.log(10), rel=1e-6)


@pytest.mark.parametrize("hard", [False, True])
def test_accuracy_counts_positives_that_come_first(hard: bool) -> None:
    eye = np.eye(4, dtype=np.float32)
    positive = eye[[0, 1, 3, 2]]  # anchors 2 and 3 have each other's
    if not hard:
        assert ours([eye, positive])[1] == 0.5
        return
    hard_negative = np.roll(eye, 1, axis=1)
    assert ours([eye, eye, hard_negative])[1] == 1.0
    near = np.float32(0.8) * eye + np.float32(0.6) * np.roll(eye, 1, axis=1)
    assert ours([eye, near, eye[[3, 3, 3, 3]]])[1] == 0.75  # e3 beats anchor 3's own


@pytest.mark.parametrize("scale", [1.0, 0.01])
def test_large_logits_do_not_overflow(scale: float) -> None:
    """At a low temperature exp(cosine / temperature) alone is beyond fp32."""
    vectors = [jnp.asarray(x) for x in unit_vectors(8, 3, seed=0)]
    call: Callable[..., tuple[jax.Array, jax.Array]] = jax.jit(
        lambda *parts: info_nce(*parts, temperature=0.05 * scale)
    )
    loss, _ = call(*vectors)
    assert np.isfinite(float(loss))
