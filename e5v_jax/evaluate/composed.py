"""Composed image retrieval, an image and a change in words to the changed image: CIRR, FashionIQ.

Protocol: the authors' retrieval.py, also for what is summed: the two vectors of a FashionIQ query
as the model gives them, then normalised.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from e5v_jax.evaluate.composed_sets import ComposedSet
from e5v_jax.evaluate.embedding import Embedder, normalised
from e5v_jax.evaluate.files import ImageRef, load
from e5v_jax.evaluate.ranking import hits_at, rank_positives, top_k
from e5v_jax.evaluate.report import Row, make_row
from e5v_jax.evaluate.scores import Hits, Score
from e5v_jax.prompts import CIRR_GALLERY, CIRR_QUERY, FASHIONIQ_GALLERY, FASHIONIQ_QUERY

FASHIONIQ_TYPES = ("dress", "shirt", "toptee")
CIRR_AT = (1, 5, 10, 50)
FASHIONIQ_AT = (10, 50)
# Queries of the validation sets, which the paper's figures (FashionIQ) are over.
FASHIONIQ_QUERIES = {"dress": 2017, "shirt": 2038, "toptee": 1961}
_SUBMITTED = 50  # names a query, as the CIRR server wants


def score_cirr(embedder: Embedder, data: ComposedSet) -> list[Score]:
    """Recall at 1, 5, 10 and 50, the reference image not counted as an answer.

    Raises:
        ValueError: see :meth:`Embedder.embed`.
    """
    assert data.targets is not None
    queries, gallery = _embed_cirr(embedder, data)
    ranks = rank_positives(queries, gallery, list(data.targets[:, None]), removed=data.references)
    once = np.ones(len(queries), int)
    asked = data.fingerprint()
    return [Score("cirr", f"R@{k}", Hits(hits_at(ranks, k), once), asked) for k in CIRR_AT]


def cirr_submission(embedder: Embedder, data: ComposedSet) -> dict[str, str | list[str]]:
    """What CIRR's test server takes: the 50 best images of each query, best first.

    Raises:
        ValueError: see :meth:`Embedder.embed`.
    """
    queries, gallery = _embed_cirr(embedder, data)
    best = top_k(queries, gallery, _SUBMITTED, removed=data.references)
    names = {
        pair: [data.gallery_ids[row] for row in rows]
        for pair, rows in zip(data.pair_ids, best, strict=True)
    }
    return {"version": "rc2", "metric": "recall", **names}


def _embed_cirr(embedder: Embedder, data: ComposedSet) -> tuple[np.ndarray, np.ndarray]:
    gallery = embedder.embed(
        data.gallery, prompt=CIRR_GALLERY, make=load, where=lambda i: str(data.gallery[i])
    )
    queries = embedder.embed(
        [(image, caption) for image, (caption,) in zip(data.images, data.captions, strict=True)],
        prompt=CIRR_QUERY,
        make=_composed,
        where=lambda i: f"CIRR query {data.pair_ids[i]}",
    )
    return queries, gallery


def score_fashioniq(embedder: Embedder, kind: str, data: ComposedSet) -> list[Score]:
    """Recall at 10 and 50 of one type; a query counts its two captions in both orders.

    Raises:
        ValueError: see :meth:`Embedder.embed`.
    """
    assert data.targets is not None
    word = "shirt" if kind == "toptee" else kind
    gallery = embedder.embed(
        data.gallery,
        prompt=FASHIONIQ_GALLERY.replace("{type}", word),
        make=load,
        where=lambda i: str(data.gallery[i]),
    )
    one_way, other_way = (
        embedder.embed(
            [
                (image, join_captions(captions[::step]))
                for image, captions in zip(data.images, data.captions, strict=True)
            ],
            prompt=FASHIONIQ_QUERY.replace("{type}", word),
            make=_composed,
            where=lambda i: f"FashionIQ {kind} query {i}",
            normalize=False,
        )
        for step in (1, -1)
    )
    ranks = rank_positives(normalised(one_way + other_way), gallery, list(data.targets[:, None]))
    once = np.ones(len(one_way), int)
    task, asked = f"fashioniq-{kind}", data.fingerprint()
    return [Score(task, f"R@{k}", Hits(hits_at(ranks, k), once), asked) for k in FASHIONIQ_AT]


def join_captions(captions: Sequence[str]) -> str:
    """The two captions of a FashionIQ query as the authors join them."""
    return ", ".join(caption.strip(".?, ") for caption in captions)


def fashioniq_rows(scores: dict[str, list[Score]]) -> list[Row]:
    """Rows for the report; the average once all three types are there."""
    rows = []
    for kind, of_kind in scores.items():
        for score in of_kind:
            queries = len(score.items.hits) if isinstance(score.items, Hits) else 0
            whole = queries == FASHIONIQ_QUERIES[kind]
            label = f"FashionIQ {kind}"
            rows.append(make_row(score.task, label, f"{queries} queries", [score], whole))
    if set(scores) == set(FASHIONIQ_TYPES):
        whole = all(row.published.paper is not None for row in rows)
        for of_types in zip(*scores.values(), strict=True):
            rows.append(
                make_row("fashioniq-average", "FashionIQ average", "3 types", list(of_types), whole)
            )
    return rows


def cirr_rows(scores: list[Score]) -> list[Row]:
    """Rows for the report. The paper has no validation figures."""
    rows = []
    for score in scores:
        queries = len(score.items.hits) if isinstance(score.items, Hits) else 0
        rows.append(make_row(score.task, "CIRR val", f"{queries} queries", [score], False))
    return rows


def _composed(item: tuple[ImageRef, str]) -> dict[str, Any]:
    image, text = item
    return {"image": load(image), "text": text}
