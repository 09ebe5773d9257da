"""What the demo measures before and after training, and how it is shown in a terminal."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rich.table import Table

from e5v_jax import E5V
from e5v_jax.evaluate.ranking import hits_at, rank_positives

COLUMNS = ("sent0", "sent1", "hard_neg")
_BARS = " ▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Scores:
    """How the held-out triplets lie in the space of one model."""

    paraphrases: dict[str, float]
    """Each ``sent1`` is a query for its ``sent0``, among all other sentences."""
    triplets: dict[str, float]
    """Each ``sent0`` is a query for its ``sent1``, while its ``hard_neg`` is there."""
    cosines: dict[str, np.ndarray]
    """Of pairs of sentences, by kind of pair."""
    vectors: np.ndarray
    """Of all sentences, column after column, float32 [3N, D], unit length."""


def score(model: E5V, sentences: Sequence[str]) -> Scores:
    """Embed the N triplets of ``sentences``, all sent0, all sent1, all hard_neg, and rank."""
    vectors = model.encode(sentences)  # [3N, D]
    n = len(vectors) // 3
    index = np.arange(n)
    found = rank_positives(vectors[n : 2 * n], vectors, list(index[:, None]), removed=index + n)
    paraphrases = {f"recall@{k}": float(hits_at(found, k).mean()) for k in (1, 5)}
    paraphrases["mean reciprocal rank"] = float((1 / (1 + found.better)).mean())
    cosines = model.similarity(vectors[:n], vectors[n:])  # [N, 2N]
    right, wrong = cosines[index, index], cosines[index, index + n]
    others = cosines[:, :n][~np.eye(n, dtype=bool)]
    hard = rank_positives(vectors[:n], vectors[n:], list(index[:, None]))
    return Scores(
        paraphrases,
        {
            "closer than its hard negative": float((right > wrong).mean()),
            "closest of all": float(hits_at(hard, 1).mean()),
        },
        {"paraphrases": right, "one fact changed": wrong, "unrelated": others},
        vectors,
    )


def compare(title: str, before: dict[str, float], after: dict[str, float]) -> Table:
    """A table of two models' shares, 0 to 1."""
    table = Table("held out", "prompt only", "after training", title=title)
    for name in before:
        table.add_row(name, f"{before[name]:.1%}", f"{after[name]:.1%}")
    return table


def draw_cosines(cosines: dict[str, np.ndarray], *, bins: int = 44) -> list[str]:
    """Histograms of cosines, a line of text for each kind of pair, its highest bar in full.

    The axis goes from the lowest cosine to 1 and is the last line.
    """
    low = min(float(values.min()) for values in cosines.values())
    lines = []
    for name, values in cosines.items():
        counts, _ = np.histogram(values, bins=bins, range=(low, 1 + 1e-6))
        heights = np.ceil(counts / counts.max() * (len(_BARS) - 1)).astype(int)
        lines.append(f"{name:>16}  {''.join(_BARS[height] for height in heights)}")
    return [*lines, f"{'cosine':>16}  {f'{low:.3f}':<{bins - 5}}1.000"]


def nearest(
    vectors: np.ndarray, sentences: Sequence[str], query: np.ndarray, k: int = 3
) -> list[str]:
    """The ``k`` sentences nearest to ``query``, float32 [D], with their cosines, as lines."""
    cosines = vectors @ query
    best = np.argsort(-cosines, kind="stable")[:k]
    return [f"{cosines[i]:.3f}  {sentences[i]}" for i in best]
