"""What the demo computes and draws, on vectors that are known."""

from typing import Any

import numpy as np
import pytest

from e5v_jax.demo.command import Args
from e5v_jax.demo.scores import compare, draw_cosines, nearest, score


class Known:
    """A model whose vectors are given."""

    def __init__(self, vectors: np.ndarray) -> None:
        self.vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def encode(self, _: list[str]) -> np.ndarray:
        return self.vectors

    def similarity(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return a @ b.T


def test_scores_of_known_vectors() -> None:
    """Of four triplets one paraphrase is nearer to another row, one hard negative wins."""
    first = np.eye(4, 8)
    paraphrases, hard = first.copy(), np.eye(4, 8, k=4) + 0.5 * first
    paraphrases[0] = 0.6 * first[0] + first[1]  # two of row 1 are nearer to it
    hard[3] = 2 * first[3] + 0.1 * hard[3]
    paraphrases[3] = first[3] + 0.5 * np.eye(1, 8, k=6)[0]
    model: Any = Known(np.concatenate([first, paraphrases, hard]).astype(np.float32))
    found = score(model, ["..."] * 12)
    assert found.paraphrases["recall@1"] == pytest.approx(0.75)
    assert found.paraphrases["recall@5"] == 1
    assert found.paraphrases["mean reciprocal rank"] == pytest.approx((1 / 3 + 3) / 4)
    assert found.triplets["closer than its hard negative"] == pytest.approx(0.75)
    assert found.triplets["closest of all"] == pytest.approx(0.75)
    assert found.vectors.shape == (12, 8)
    assert found.cosines["unrelated"].shape == (12,)
    assert compare("title", found.paraphrases, found.paraphrases).row_count == 3


def test_the_picture_has_every_pair() -> None:
    """Each kind has its highest bar in full; no pair is too rare to be seen."""
    cosines = {"same": np.array([0.99] * 100 + [0.93]), "other": np.array([0.0, 0.01, 0.11])}
    same, other, axis = draw_cosines(cosines, bins=20)
    assert same == f"{'same':>16}  {'▁█':>20}"
    assert other == f"{'other':>16}  {'█ ▄':<20}"
    assert axis == f"{'cosine':>16}  0.000          1.000"


def test_the_nearest_come_first() -> None:
    lines = nearest(np.eye(3, dtype=np.float32), ["a", "b", "c"], np.array([0.2, 0.9, 0.1]), 2)
    assert lines == ["0.900  b", "0.200  a"]


def test_the_files_are_there() -> None:
    assert Args().config.is_file() and Args().heldout.is_file()
