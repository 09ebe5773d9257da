"""Lengths of embeddings, and the refusal of those that a broken model gives."""

from collections.abc import Sequence

import numpy as np


def dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Multiply each row with its like, [N, D] x [N, D] -> float64 [N]."""
    return np.einsum("nd,nd->n", a, b, dtype=np.float64)


def normalised(vectors: np.ndarray) -> np.ndarray:
    """Scale the vectors [N, D] to unit length."""
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def squared_lengths(vectors: np.ndarray, names: Sequence[str], *, what: str) -> np.ndarray:
    """Return the squared length of the vector of each name, [N, D] -> float64 [N].

    ``what`` says what the names are of, for messages.
    Raises ValueError: the shape is another, or a vector is zero or not finite.
    """
    count = len(names)
    if vectors.ndim != 2 or len(vectors) != count:
        raise ValueError(f"embeddings have shape {vectors.shape}, expected ({count}, dimensions)")
    squares = dot(vectors, vectors)
    bad = np.flatnonzero(~np.isfinite(squares) | (squares == 0))
    if bad.size:
        raise ValueError(
            f"the embeddings of {bad.size} of {count} {what} are zero or not finite, first that of "
            f"{names[bad[0]]}: is the model whole, does its dtype suffice?"
        )
    return squares
