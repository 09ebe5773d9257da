"""Recall at k, with ties counted as what a random order of the tied items would give.

Without ties it is the authors' (retrieval.py: ``torch.topk``, a hit where any positive is among the
k best). Among equal scores topk's choice is arbitrary, and file order would let a model that embeds
everything alike score by the order of the data: here such a model scores exactly chance.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from e5v_jax.evaluate.scores import Hits, Score

_CHUNK = 1024  # queries scored at once: bounds the memory of the score matrix


class Ranks(NamedTuple):
    """This says where the best positive of each query stands; every array is int64 [Q]."""

    better: np.ndarray  # gallery items with a higher score
    tied: np.ndarray  # gallery items with the same score, itself included
    positives: np.ndarray  # how many of the tied are positives


def rank_positives(
    queries: np.ndarray,
    gallery: np.ndarray,
    positives: Sequence[np.ndarray],
    *,
    removed: np.ndarray | None = None,
) -> Ranks:
    """Rank the normalised ``gallery`` [G, D] for each of ``queries`` [Q, D] by dot product.

    ``positives`` are the gallery rows that are right for each query, at least one; ``removed``,
    int [Q], is a row that is left out for it (CIRR's reference image).
    Raises ValueError: a query has no positive, or its only one is removed.
    """
    parts = []
    for start, scores in _scores(queries, gallery, removed):
        right = np.zeros(scores.shape, bool)
        for row in range(len(scores)):
            right[row, positives[start + row]] = True
        best = np.where(right, scores, -np.inf).max(axis=1, keepdims=True)  # [C, 1]
        if not np.isfinite(best).all():
            bad = start + int(np.flatnonzero(~np.isfinite(best))[0])
            raise ValueError(f"query {bad} has no positive in the gallery")
        equal = scores == best
        parts.append(((scores > best).sum(axis=1), equal.sum(axis=1), (equal & right).sum(axis=1)))
    return Ranks(*(np.concatenate(part) for part in zip(*parts, strict=True)))


def hits_at(ranks: Ranks, k: int) -> np.ndarray:
    """Return what each query scores, float64 [Q]: 1 if a positive is among the k best, else 0.

    A tie across k gives a value between.
    """
    miss = np.ones(len(ranks.better))
    for drawn in range(k):  # draw the remaining places of the k from the tied items, one by one
        left = ranks.tied - drawn
        wrong = np.maximum(left - ranks.positives, 0) / np.maximum(left, 1)
        miss *= np.where(drawn < k - ranks.better, wrong, 1)
    return 1 - miss


def recalls(
    task: str,
    ranks: Ranks,
    at: Sequence[int],
    data: str,
    *,
    prefix: str = "",
    unit_of: np.ndarray | None = None,
) -> list[Score]:
    """Score the recall of a task at each k of ``at``; ``data`` is the hash of its questions.

    ``unit_of``, int [Q], says to which of the units that were sampled a query belongs, each having
    one at least; by default a query is a unit.
    """
    units = np.arange(len(ranks.better)) if unit_of is None else unit_of
    queries = np.bincount(units)
    return [
        Score(task, f"{prefix}R@{k}", Hits(np.bincount(units, hits_at(ranks, k)), queries), data)
        for k in at
    ]


def top_k(
    queries: np.ndarray, gallery: np.ndarray, k: int, *, removed: np.ndarray | None = None
) -> np.ndarray:
    """Return the k best rows, int64 [Q, k], ties in gallery order; see :func:`rank_positives`."""
    chunks = (scores for _, scores in _scores(queries, gallery, removed))
    return np.concatenate([np.argsort(-s, axis=1, kind="stable")[:, :k] for s in chunks])


def _scores(
    queries: np.ndarray, gallery: np.ndarray, removed: np.ndarray | None
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the first query of each chunk and the scores of the chunk, [C, G].

    Equal gallery rows get equal scores, which a matrix product does not promise.
    """
    index: dict[bytes, int] = {}
    column = [index.setdefault(row.tobytes(), len(index)) for row in gallery]
    distinct = gallery[np.unique(column, return_index=True)[1]]
    for start in range(0, len(queries), _CHUNK):
        scores = (queries[start : start + _CHUNK] @ distinct.T)[:, column]
        if removed is not None:
            scores[np.arange(len(scores)), removed[start : start + _CHUNK]] = -np.inf
        yield start, scores
