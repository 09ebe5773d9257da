"""Composed image retrieval, an image and a change in words to the changed image: CIRR, FashionIQ.

Protocol: the authors' retrieval.py, also for what is summed: the two vectors of a FashionIQ query
as the model gives them, then normalised. Scoring raises what :meth:`CachedEncoder.embed` does.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path

import numpy as np

from e5v_jax.evaluate.cached_encoder import CachedEncoder
from e5v_jax.evaluate.composed_sets import ComposedSet, load_cirr, load_fashioniq, take
from e5v_jax.evaluate.config import Protocol
from e5v_jax.evaluate.files import CheckText, as_input
from e5v_jax.evaluate.ranking import rank_positives, recalls, top_k
from e5v_jax.evaluate.report import Report, Row, Submission, make_row
from e5v_jax.evaluate.scores import Score
from e5v_jax.evaluate.vectors import normalised
from e5v_jax.prompts import CIRR_GALLERY, CIRR_QUERY, FASHIONIQ_GALLERY, FASHIONIQ_QUERY

CIRR_AT = (1, 5, 10, 50)
FASHIONIQ_AT = (10, 50)
FASHIONIQ_QUERIES = {"dress": 2017, "shirt": 2038, "toptee": 1961}  # of validation, as in the paper
CIRR, CIRR_TEST, _FASHIONIQ = "cirr", "cirr-test", "fashioniq-"
FASHIONIQ_TASKS = tuple(_FASHIONIQ + kind for kind in FASHIONIQ_QUERIES)
SUBMISSION = "cirr-submission.json"
_SUBMITTED = 50  # names a query, as the CIRR server wants


def score_cirr(encoder: CachedEncoder, data: ComposedSet) -> list[Score]:
    """Score recall at 1, 5, 10 and 50; the reference image does not count as an answer."""
    assert data.targets is not None
    queries, gallery = _embed_cirr(encoder, data)
    ranks = rank_positives(queries, gallery, list(data.targets[:, None]), removed=data.references)
    return recalls(CIRR, ranks, CIRR_AT, data.fingerprint())


def cirr_submission(encoder: CachedEncoder, data: ComposedSet) -> dict[str, str | list[str]]:
    """Return what CIRR's test server takes: the 50 best images of each query, best first."""
    best = top_k(*_embed_cirr(encoder, data), _SUBMITTED, removed=data.references)
    names = [[data.gallery_ids[row] for row in rows] for rows in best]
    answers = dict(zip(data.pair_ids, names, strict=True))
    return {"version": "rc2", "metric": "recall", **answers}


def _embed_cirr(encoder: CachedEncoder, data: ComposedSet) -> tuple[np.ndarray, np.ndarray]:
    of_gallery = encoder.prompt(CIRR_GALLERY, "document")
    gallery = encoder.embed(data.gallery, prompt=of_gallery, make=as_input)
    texts = (caption for (caption,) in data.captions)
    return normalised(_embed_queries(encoder, CIRR_QUERY, data, texts, "CIRR")), gallery


def score_fashioniq(encoder: CachedEncoder, kind: str, data: ComposedSet) -> list[Score]:
    """Score recall at 10 and 50 of one type; a query counts its two captions in both orders."""
    assert data.targets is not None
    word = "shirt" if kind == "toptee" else kind
    prompt, of_gallery = (p.replace("{type}", word) for p in (FASHIONIQ_QUERY, FASHIONIQ_GALLERY))
    gallery = encoder.embed(
        data.gallery, prompt=encoder.prompt(of_gallery, "document"), make=as_input
    )
    both_ways = [map(join_captions, data.captions), (join_captions(c[::-1]) for c in data.captions)]
    label = f"FashionIQ {kind}"
    first, second = (_embed_queries(encoder, prompt, data, texts, label) for texts in both_ways)
    ranks = rank_positives(normalised(first + second), gallery, list(data.targets[:, None]))
    return recalls(_FASHIONIQ + kind, ranks, FASHIONIQ_AT, data.fingerprint())


def _embed_queries(
    encoder: CachedEncoder, prompt: str, data: ComposedSet, texts: Iterable[str], label: str
) -> np.ndarray:
    """Embed the reference images with one text each, [Q, D], not normalised."""
    return encoder.embed(
        list(zip(data.images, texts, strict=True)),
        prompt=encoder.prompt(prompt, "query"),
        make=lambda item: {"image": as_input(item[0]), "text": item[1]},
        where=lambda i: f"{label} query {data.pair_ids[i] if data.pair_ids else i}",
        normalize=False,
    )


def join_captions(captions: Sequence[str]) -> str:
    """Join the two captions of a FashionIQ query as the authors do."""
    return ", ".join(caption.strip(".?, ") for caption in captions)


def cirr_rows(scores: list[Score]) -> list[Row]:
    """Make the rows for the report. The paper has no validation figures."""
    return [make_row(CIRR, "CIRR val", f"{len(s.items)} queries", [s], False) for s in scores]


def fashioniq_rows(scores: dict[str, list[Score]]) -> list[Row]:
    """Make the rows for the report, and the average once all three types are there."""
    rows = []
    for kind, of_kind in scores.items():
        for score in of_kind:
            asked, label = len(score.items), f"FashionIQ {kind}"
            whole = asked == FASHIONIQ_QUERIES[kind]
            rows.append(make_row(score.task, label, f"{asked} queries", [score], whole))
    if set(scores) == set(FASHIONIQ_QUERIES):
        whole = all(row.published.paper is not None for row in rows)
        rows += [
            make_row("fashioniq-average", "FashionIQ average", "3 types", list(of_types), whole)
            for of_types in zip(*scores.values(), strict=True)
        ]
    return rows


def load(data: Path, name: str, stride: int, check: CheckText) -> ComposedSet:
    """Load a task for the command; raises what :mod:`composed_sets` does."""
    if name.startswith(_FASHIONIQ):
        return take(load_fashioniq(data, name.removeprefix(_FASHIONIQ), check), stride)
    return take(load_cirr(data, "test" if name == CIRR_TEST else "val", check), stride)


def report_cirr(encoder: CachedEncoder, data: Mapping[str, ComposedSet], _: Protocol) -> Report:
    """Score CIRR's validation set."""
    scores = score_cirr(encoder, data[CIRR])
    return Report({}, cirr_rows(scores), scores)


def submit(encoder: CachedEncoder, data: Mapping[str, ComposedSet], _: Protocol) -> Report:
    """Answer CIRR's test set."""
    content = cirr_submission(encoder, data[CIRR_TEST])
    submission = Submission(SUBMISSION, "https://cirr.cecs.anu.edu.au", content)
    return Report({}, [], submissions=[submission])


def report_fashioniq(
    encoder: CachedEncoder, data: Mapping[str, ComposedSet], _: Protocol
) -> Report:
    """Score the types of FashionIQ that were loaded."""
    kinds = {name.removeprefix(_FASHIONIQ): garments for name, garments in data.items()}
    scores = {kind: score_fashioniq(encoder, kind, garments) for kind, garments in kinds.items()}
    return Report({}, fashioniq_rows(scores), list(chain(*scores.values())))
