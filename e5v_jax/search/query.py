"""What is searched for, words, photographs and both, and what is found."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from e5v_jax.data.inputs import Input
from e5v_jax.encode.files import IMAGE_SUFFIXES
from e5v_jax.search.photographs import upright
from e5v_jax.search.store import Row, Snapshot

Embed = Callable[[Input], np.ndarray]
"""A query's vector, fp32 [D], of unit length. Raises ValueError: the input is bad."""
WEIGHT = 0.5  # of a term that is added or taken away, beside what is searched for
DUPLICATE = 0.97  # cosine from which two rows look alike
_SIGN = re.compile("([+\N{MINUS SIGN}-])([0-9]*[.]?[0-9]*)")
_LOOKED_AT = 10  # rows for each that is wanted, before near-duplicates are left out


@dataclass(frozen=True)
class Term:
    """A part of a query: what to embed, or its vector, or a row of the index that has it."""

    item: Input | None = None
    vector: np.ndarray | None = None  # fp32 [D]
    row: int | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class Hit:
    """A row that was found; ``score`` is the cosine of its vector and the query's."""

    row: Row
    score: float


class Unavailable(RuntimeError):
    """The model takes no query now; the message is one line."""


class QueryError(ValueError):
    """A query that cannot be searched for; the message is one line."""


def parse_terms(words: Sequence[str]) -> list[Term]:
    """Read a query as it stands on the command line: terms with + or - between them.

    A term is words, the path of a photograph, or a path and words: the photograph changed as they
    say. ``+`` and ``-`` may have a weight behind them, ``-0.3``; without one it is ``WEIGHT``.

    Raises QueryError: there is no term, no such photograph, or nothing behind a sign.
    """
    groups: list[tuple[float, list[str]]] = [(1.0, [])]
    for word in words:
        if sign := _SIGN.fullmatch(word):
            weight = WEIGHT
            if sign[2] not in ("", "."):
                weight = float(sign[2])
            groups.append((weight if sign[1] == "+" else -weight, []))
        else:
            groups[-1][1].append(word)
    if not groups[0][1]:
        raise QueryError("nothing to search for: give words, a photograph, or both, first")
    return [Term(_item(parts), weight=weight) for weight, parts in groups]


def _item(words: Sequence[str]) -> Input:
    images = [word for word in words if word.lower().endswith(IMAGE_SUFFIXES)]
    texts = [word for word in words if word not in images]
    if not words:
        raise QueryError("a + or - has nothing behind it")
    if len(images) > 1 or len(texts) > 1:
        what = "photographs" if len(images) > 1 else "texts"
        raise QueryError(f"two {what} side by side: quote them as one, or put + or - between them")
    if images:
        if not Path(images[0]).is_file():
            raise QueryError(f"{images[0]}: no such file")
        return make_item(texts[0] if texts else None, Path(images[0]))
    return make_item(texts[0], None)


def make_item(text: str | None, image: Path | bytes | None) -> Input:
    """An input of a text, a photograph that is turned upright, or both.

    Raises QueryError: there is neither; ImageError: the photograph cannot be read.
    """
    text = (text or "").strip() or None
    if image is None:
        if text is None:
            raise QueryError("nothing to search for: the text is empty")
        return text
    turned = upright(image)
    return turned if text is None else {"text": text, "image": turned}


def embed_terms(terms: Sequence[Term], embed: Embed) -> list[Term]:
    """The same terms with vectors in place of items. Raises ValueError: as ``embed``."""
    return [
        term if term.item is None else Term(vector=embed(term.item), weight=term.weight)
        for term in terms
    ]


def combine(terms: Sequence[Term], now: Snapshot) -> np.ndarray:
    """Add up the vectors of embedded terms by their weights: fp32 [D], of unit length.

    Raises QueryError: a row is not there any more, or nothing is left of the sum; ValueError: the
    index has another D.
    """
    vector = np.zeros(now.vectors.dimensions, np.float32)
    for term in terms:
        if term.vector is not None:
            part = term.vector
            if part.shape != vector.shape:
                raise ValueError(
                    f"the model gives {part.shape[0]} dimensions, the index has {len(vector)}: "
                    "index again with this model"
                )
        else:
            row = None if term.row is None else now.row(term.row)
            if row is None:
                raise QueryError("what more like it was searched for is no more in the index")
            part = now.vectors.take([row.slot])[0].astype(np.float32)
        vector += term.weight * part
    length = float(np.linalg.norm(vector))
    if not np.isfinite(length) or length < 1e-3:
        raise QueryError("the terms take each other away: nothing is left to search for")
    return vector / np.float32(length)


def find(
    now: Snapshot,
    vector: np.ndarray,
    top: int,
    *,
    threshold: float = -1.0,
    duplicates: float | None = None,
) -> list[Hit]:
    """The rows nearest to a vector [D], best first, at most ``top``.

    Those below ``threshold`` are left out, and with ``duplicates`` those whose cosine with a better
    one is at least as much; of equal contents, the first by path is the better.
    """
    if not now.live.size:
        return []
    wanted = min(now.live.size, top if duplicates is None else top * _LOOKED_AT)
    slots, scores = now.vectors.nearest(vector, wanted, now.live)
    above = scores >= threshold
    slots, scores = slots[above], scores[above]
    if duplicates is not None:
        kept = _distinct(now.vectors.take(slots.tolist()), top, duplicates)
        slots, scores = slots[kept], scores[kept]
    rows = now.rows_of(slots[:top].tolist())
    hits: list[Hit] = []
    for slot, cosine in zip(slots.tolist(), scores.tolist(), strict=True):
        found = rows.get(slot, []) if duplicates is None else rows.get(slot, [])[:1]
        hits += [Hit(row, cosine) for row in found]
        if len(hits) >= top:
            break
    return hits[:top]


def _distinct(candidates: np.ndarray, top: int, least: float) -> list[int]:
    """Positions of the first ``top`` vectors of [n, D] that are not as near to one before."""
    kept: list[int] = []
    vectors = np.empty((top, candidates.shape[1]), np.float32)
    for position, candidate in enumerate(candidates):
        vector = candidate.astype(np.float32)
        if not kept or float((vectors[: len(kept)] @ vector).max()) < least:
            vectors[len(kept)] = vector
            kept.append(position)
            if len(kept) == top:
                break
    return kept
