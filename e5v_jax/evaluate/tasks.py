"""The names that ``--tasks`` takes, and what each loads and scores."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from e5v_jax import cli
from e5v_jax.evaluate import composed, composed_sets, retrieval, sts
from e5v_jax.evaluate.composed import FASHIONIQ_TYPES
from e5v_jax.evaluate.composed_sets import ComposedSet
from e5v_jax.evaluate.embedding import Embedder
from e5v_jax.evaluate.files import HUB
from e5v_jax.evaluate.report import Row
from e5v_jax.evaluate.retrieval import OWN, CaptionedImages
from e5v_jax.evaluate.scores import Score
from e5v_jax.evaluate.sts import StsPairs
from e5v_jax.prompts import PLAIN, STS

_I2I, _FASHIONIQ = "i2i-", "fashioniq-"
_RETRIEVAL = (*retrieval.TASKS, OWN)
_GROUPS = {"sts": sts.PAPER_TASKS, "fashioniq": tuple(_FASHIONIQ + t for t in FASHIONIQ_TYPES)}
TASKS = (
    *sts.TASKS,
    *_RETRIEVAL,
    *(_I2I + name for name in _RETRIEVAL),
    "cirr",
    "cirr-test",
    *_GROUPS["fashioniq"],
)
Data = StsPairs | CaptionedImages | ComposedSet


@dataclass
class Result:
    """What was measured."""

    rows: list[Row] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)
    submission: dict[str, str | list[str]] | None = None
    """For CIRR's test server."""


def choose_tasks(text: str) -> list[str]:
    """The task names that ``--tasks`` asks for, each once, in the order given.

    Raises:
        cli.UsageError: an unknown name, or none.
    """
    names: list[str] = []
    for word in filter(None, (word.strip() for word in text.split(","))):
        if word not in _GROUPS and word not in TASKS:
            known = ", ".join([*_GROUPS, *TASKS])
            raise cli.UsageError(f"--tasks: unknown task {word!r}, expected of {known}")
        names += _GROUPS.get(word, (word,))
    if not names:
        raise cli.UsageError("--tasks: no task given")
    return list(dict.fromkeys(names))


def load_data(data: Path, name: str, *, stride: int) -> Data:
    """The data of a task, every ``stride``-th item of it.

    Raises:
        OSError, ValueError: names file and row, and what was expected.
    """
    if name in sts.TASKS:
        if data == HUB:
            raise ValueError(f"{name}: SentEval's files are not on the hub: give their folder")
        return sts.load_task(data, name, stride=stride)
    if name.startswith("cirr"):
        split = "test" if name == "cirr-test" else "val"
        return composed_sets.take(composed_sets.load_cirr(data, split), stride)
    if name.startswith(_FASHIONIQ):
        kind = name.removeprefix(_FASHIONIQ)
        return composed_sets.take(composed_sets.load_fashioniq(data, kind), stride)
    return retrieval.take(retrieval.load_task(data, name.removeprefix(_I2I)), stride)


def run_tasks(
    embedder: Embedder, data: Mapping[str, Data], *, protocol: Literal["paper", "plain"]
) -> Result:
    """Score all tasks, in the order given but STS first.

    Raises:
        ValueError: see :meth:`Embedder.embed`.
    """
    result = Result()
    _run_sts(embedder, data, protocol, result)
    garments: dict[str, list[Score]] = {}
    for name, items in data.items():
        if isinstance(items, CaptionedImages):
            base = name.removeprefix(_I2I)
            drawn = base != name
            label = retrieval.TASKS[base].label if base in retrieval.TASKS else "own images"
            label += ", drawn captions" if drawn else ""
            scores = retrieval.score_retrieval(embedder, name, items, drawn=drawn)
            result.rows += retrieval.report_rows(name, items, scores, label=label)
        elif isinstance(items, ComposedSet) and name == "cirr-test":
            result.submission = composed.cirr_submission(embedder, items)
            continue
        elif isinstance(items, ComposedSet) and name == "cirr":
            scores = composed.score_cirr(embedder, items)
            result.rows += composed.cirr_rows(scores)
        elif isinstance(items, ComposedSet):
            kind = name.removeprefix(_FASHIONIQ)
            scores = garments[kind] = composed.score_fashioniq(embedder, kind, items)
        else:
            continue
        result.scores += scores
    result.rows += composed.fashioniq_rows(garments)
    return result


def _run_sts(
    embedder: Embedder,
    data: Mapping[str, Data],
    protocol: Literal["paper", "plain"],
    result: Result,
) -> None:
    pairs = {name: items for name, items in data.items() if isinstance(items, StsPairs)}
    if not pairs:
        return
    paper = protocol == "paper"

    def encode(sentences: list[str]) -> np.ndarray:
        return embedder.embed(
            sentences,
            prompt=STS if paper else PLAIN,
            make=str,
            where=lambda i: f"sentence {sentences[i]!r}",
            normalize=False,  # rounding would break ties of the cosine
        )

    scores = sts.score_tasks(encode, pairs, clean=sts.clean_sentence if paper else str.strip)
    result.rows += sts.report_rows(scores, comparable=paper)
    result.scores += [score.score for score in scores.values()]
