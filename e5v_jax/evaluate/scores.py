"""What an evaluation measured, kept per item: the score, its interval, the paired comparison.

Intervals are 95 % percentile bootstrap intervals over the units that were sampled when the data was
made: sentence pairs, photographs (with all their captions), composed queries.
"""

import hashlib
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

RESAMPLES = 2000
_SEED = 0
_CHUNK = 200  # resamples computed at once: bounds memory


@dataclass(frozen=True)
class Hits:
    """This is a recall: hits summed over the queries of each unit."""

    hits: np.ndarray  # float64 [N]
    queries: np.ndarray  # int64 [N]

    def __len__(self) -> int:
        return len(self.hits)

    def value(self) -> float:
        """Return the percentage of all queries that hit."""
        return float(100 * self.hits.sum() / self.queries.sum())

    def resample(self, weights: np.ndarray) -> np.ndarray:
        """Return the value of each resample, [B]; ``weights`` [B, N] count each unit in it."""
        return 100 * (weights @ self.hits) / (weights @ self.queries)


@dataclass(frozen=True)
class Pairs:
    """This is a rank correlation of cosine and human score; both float64 [N]."""

    cosine: np.ndarray
    gold: np.ndarray

    def __len__(self) -> int:
        return len(self.cosine)

    def value(self) -> float:
        """Return Spearman's correlation times 100; raises what :func:`spearman` does."""
        return 100 * spearman(self.cosine, self.gold)

    def resample(self, weights: np.ndarray) -> np.ndarray:
        """Return each resample's value as :class:`Hits` do; nan where one holds a single value."""
        middle = (weights.sum(axis=1, keepdims=True) + 1) / 2  # the mean rank, whatever the ties
        x, y = (_ranks(values, weights) - middle for values in (self.cosine, self.gold))  # [B, N]
        covariance, xx, yy = ((weights * a * b).sum(axis=1) for a, b in ((x, y), (x, x), (y, y)))
        with np.errstate(invalid="ignore", divide="ignore"):
            return 100 * (covariance / np.sqrt(xx * yy))


@dataclass(frozen=True)
class Score:
    """This is one figure of a task, with what it was computed from."""

    task: str
    metric: str
    items: Hits | Pairs
    data: str  # hash of the questions asked: only scores over the same ones can be compared

    def resamples(self) -> np.ndarray:
        """Return [RESAMPLES] values; every score of the task draws the same units."""
        units = len(self.items)
        rng = np.random.default_rng([_SEED, zlib.crc32(self.task.encode())])
        values = []
        for start in range(0, RESAMPLES, _CHUNK):
            rows = min(_CHUNK, RESAMPLES - start)
            drawn = rng.integers(0, units, (rows, units)) + units * np.arange(rows)[:, None]
            weights = np.bincount(drawn.ravel(), minlength=rows * units).reshape(rows, units)
            values.append(self.items.resample(weights))
        return np.concatenate(values)


class Difference(NamedTuple):
    """This is B minus A in percent points, the ends of its 95 % interval, a two-sided p-value."""

    value: float
    low: float
    high: float
    p: float


def summarise(scores: Sequence[Score]) -> tuple[float, float, float]:
    """Return the mean, in percent, of one or several tasks' scores and the ends of its interval."""
    value = float(np.mean([score.items.value() for score in scores]))
    return value, *_interval(np.mean([score.resamples() for score in scores], axis=0))


def compare(first: Score, second: Score) -> Difference:
    """Compare two runs by paired bootstrap. Raises ValueError: not of one task, metric and data."""
    for name in ("task", "metric", "data", "number of items"):
        a, b = (getattr(score, name, len(score.items)) for score in (first, second))
        if a != b:
            raise ValueError(
                f"{first.task}, {first.metric}: the runs did not answer the same questions (other "
                f"{name}): evaluate both on the same data with the same --stride and --protocol"
            )
    difference = second.resamples() - first.resamples()
    difference = difference[~np.isnan(difference)]
    # One more than counted: no finite number of resamples makes a difference certain.
    tail = 1 + min(np.sum(difference <= 0), np.sum(difference >= 0))
    p = min(1.0, 2 * float(tail) / (len(difference) + 1))
    return Difference(second.items.value() - first.items.value(), *_interval(difference), p)


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Return Spearman's rank correlation of two [N] arrays; equal values share their average rank.

    Raises ValueError: it is undefined, as one array is constant.
    """
    for v in (x, y):
        if np.all(v == v[0]):
            raise ValueError(f"rank correlation is undefined: all {len(v)} values are {v[0]:g}")
    once = np.ones((1, len(x)), np.int64)
    return float(np.corrcoef(*(_ranks(values, once)[0] for values in (x, y)))[0, 1])


def fingerprint(strings: Iterable[str]) -> str:
    """Return the hash of the questions of a task."""
    # file names may have lone surrogates
    encoded = (string.encode(errors="surrogatepass") + b"\0" for string in strings)
    return hashlib.sha256(b"".join(encoded)).hexdigest()


def _ranks(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return average ranks from 1 of ``x`` [N] in each resample ``weights``, float64 [B, N]."""
    # sorted once for all resamples, which are only counted
    _, inverse = np.unique(x, return_inverse=True)
    order = np.argsort(inverse, kind="stable")
    starts = np.flatnonzero(np.diff(inverse[order], prepend=-1))  # [U], U distinct values
    counts = np.add.reduceat(weights[:, order], starts, axis=1)  # [B, U]
    last = np.cumsum(counts, axis=1)
    return (last - (counts - 1) / 2)[:, inverse]


def _interval(values: np.ndarray) -> tuple[float, float]:
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return float(low), float(high)
