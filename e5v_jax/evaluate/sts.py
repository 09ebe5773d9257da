"""Semantic textual similarity: STS12 to STS16, STS-B and SICK-R in SentEval's folder layout.

Protocol: the authors' eval_sts.py on SimCSE's copy of SentEval. A task's score is Spearman's rank
correlation of cosine and human similarity over all its subsets together ("all"), times 100.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from e5v_jax.data.inputs import InputError
from e5v_jax.evaluate.cached_encoder import CachedEncoder
from e5v_jax.evaluate.config import Protocol
from e5v_jax.evaluate.files import HUB, CheckText, any_text, check_texts, read_lines
from e5v_jax.evaluate.published import PUBLISHED
from e5v_jax.evaluate.report import Report, Row, make_row
from e5v_jax.evaluate.scores import Pairs, Score, fingerprint
from e5v_jax.evaluate.vectors import dot, squared_lengths
from e5v_jax.prompts import PLAIN, STS

Encode = Callable[[list[str]], np.ndarray]  # texts to vectors [N, D], normalised or not


class Task(NamedTuple):
    """This is a task as the paper has it."""

    label: str
    pairs: int  # that have a human score


TASKS = {
    "sts12": Task("STS12", 3108),
    "sts13": Task("STS13", 1500),
    "sts14": Task("STS14", 3750),
    "sts15": Task("STS15", 3000),
    "sts16": Task("STS16", 1186),
    "stsb": Task("STS-B", 1379),
    "sickr": Task("SICK-R", 4927),
    "stsb-dev": Task("STS-B dev", 1500),  # to watch training by; the paper reports none
}
_METRIC = "Spearman"
PAPER_TASKS = tuple(name for name in TASKS if (name, _METRIC) in PUBLISHED)

# As in senteval/sts.py. STS13 has no SMT: its sentences are not free, so the data lacks them.
_SUBSETS = {
    "sts12": ("MSRpar", "MSRvid", "SMTeuroparl", "surprise.OnWN", "surprise.SMTnews"),
    "sts13": ("FNWN", "headlines", "OnWN"),
    "sts14": ("deft-forum", "deft-news", "headlines", "images", "OnWN", "tweet-news"),
    "sts15": ("answers-forums", "answers-students", "belief", "headlines", "images"),
    "sts16": ("answer-answer", "headlines", "plagiarism", "postediting", "question-question"),
}
_HINT = "the data folder must contain STS/ and SICK/ as SentEval has them"
_SICK_COLUMNS = ["pair_ID", "sentence_A", "sentence_B", "relatedness_score"]


class StsPairs(NamedTuple):
    """These are the pairs of a task, in the order of its files; sentences as they stand there."""

    sentences1: list[str]
    sentences2: list[str]
    gold: np.ndarray  # float64 [N], human similarity, 0 to 5


def load_task(
    data_dir: str | Path, name: str, stride: int = 1, check: CheckText = any_text
) -> StsPairs:
    """Read every ``stride``-th pair of a task of :data:`TASKS`; those without a score do not count.

    ``data_dir`` contains ``STS/`` and ``SICK/``. Raises FileNotFoundError: a file of the task is
    missing; ValueError: an unknown task, the hub, a damaged file, a sentence that ``check``
    refuses; names file and row.
    """
    if name not in TASKS:
        raise ValueError(f"unknown STS task {name!r}: expected one of {', '.join(TASKS)}")
    root = Path(data_dir)
    if root == HUB:
        raise ValueError(f"{name}: SentEval's files are not on the hub: give their folder")
    rows = list(_read(root, name, check))[::stride]
    if len(rows) < 2:
        raise ValueError(f"{root}: {name} has {len(rows)} scored pairs, expected at least 2")
    first, second, gold = zip(*rows, strict=True)
    return StsPairs(list(first), list(second), np.array(gold, np.float64))


def _read(root: Path, name: str, check: CheckText) -> Iterator[tuple[str, str, float]]:
    found: list[tuple[str, list[str], str, str]] = []  # place, sentences, place of the score, score
    if name in _SUBSETS:
        folder = root / "STS" / f"{name.upper()}-en-test"
        for subset in _SUBSETS[name]:
            pairs = _split_lines(folder / f"STS.input.{subset}.txt", 2, exact=True)
            gold = _split_lines(folder / f"STS.gs.{subset}.txt", 1, exact=True)
            if len(pairs) != len(gold):
                expected = f"expected {len(pairs)} as in STS.input.{subset}.txt"
                raise ValueError(f"{folder}/STS.gs.{subset}.txt: {len(gold)} rows, {expected}")
            both = zip(pairs, gold, strict=True)
            # the organisers left some pairs unscored
            scored = [(*pair, place, score) for pair, (place, (score,)) in both if score.strip()]
            if not scored:  # the other subsets alone would make another figure
                raise ValueError(f"{folder}/STS.gs.{subset}.txt: no score, expected one a row")
            found += scored
    elif name == "sickr":
        path = root / "SICK" / "SICK_test_annotated.txt"
        rows = _split_lines(path, 4, header=_SICK_COLUMNS)
        found = [(place, row[1:3], place, row[3]) for place, row in rows]
    else:
        # genre, file, year, id, score, sentence, sentence, and in some rows sources
        split = "dev" if name == "stsb-dev" else "test"
        rows = _split_lines(root / "STS" / "STSBenchmark" / f"sts-{split}.csv", 7)
        found = [(place, row[5:7], place, row[4]) for place, row in rows]
    for place, (first, second), score_place, score in found:
        if not (first.strip() and second.strip()):
            raise ValueError(f"{place}: empty sentence")
        check_texts((first, second), check, place)
        try:
            value = float(score)
        except ValueError:
            value = np.nan
        if not 0 <= value <= 5:  # false for nan, too
            raise ValueError(f"{score_place}: score {score!r}, expected a number from 0 to 5")
        yield first, second, value


def _split_lines(
    path: Path, expected: int, *, exact: bool = False, header: Sequence[str] = ()
) -> list[tuple[str, list[str]]]:
    """Return the tab-separated fields of each line below the header, and where it stands."""
    lines = [line.split("\t") for line in read_lines(path, hint=_HINT)]
    if header:
        found = lines.pop(0) if lines else [""]
        if found[: len(header)] != header:
            shown, columns = "\t".join(found)[:80], ", ".join(header)
            raise ValueError(f"{path}, row 1: found {shown!r}, expected the columns {columns}")
    numbered = enumerate(lines, start=2 if header else 1)
    rows = [(f"{path}, row {number}", fields) for number, fields in numbered]
    for place, fields in rows:
        if len(fields) < expected or (exact and len(fields) > expected):
            wanted = f"{expected}" if exact else f"at least {expected}"
            raise ValueError(f"{place}: {len(fields)} tab-separated fields, expected {wanted}")
    return rows


def clean_sentence(sentence: str) -> str:
    """Clean a sentence as the authors do for the model (eval_sts.py, after SentEval's split).

    Single spaces; a full stop at the end if there is none of ``.?"'``; ``"`` becomes ``'``; a final
    question mark becomes a full stop.
    """
    sentence = " ".join(sentence.split())
    if sentence and sentence[-1] not in ".?\"'":
        sentence += "."
    sentence = sentence.replace('"', "'")
    return sentence[:-1] + "." if sentence.endswith("?") else sentence


def score_tasks(
    encode: Encode, tasks: Mapping[str, StsPairs], *, clean: Callable[[str], str] = clean_sentence
) -> dict[str, Score]:
    """Score loaded tasks, by their names; ``clean`` is applied to each sentence.

    ``encode`` is called once, with each distinct sentence of them all once.
    Raises ValueError: ``encode`` returned another shape than [N, D], a vector that is zero or not
    finite, or the same cosine for all pairs of a task.
    """
    index: dict[str, int] = {}  # sentence -> row of vectors
    sides = {
        name: [np.array([index.setdefault(clean(s), len(index)) for s in side]) for side in both]
        for name, (*both, _) in tasks.items()
    }
    try:
        vectors = np.asarray(encode(list(index)))  # [N, D]
    except InputError as error:
        raise ValueError(f"{list(index)[error.position]!r}: {error.reason}") from error
    squares = squared_lengths(vectors, list(map(repr, index)), what="sentences")  # [N]
    scores = {}
    for name, (rows1, rows2) in sides.items():
        # One root of the product, not two: a sentence paired with itself gets exactly 1, to tie.
        norms = np.sqrt(squares[rows1] * squares[rows2])
        cosine = dot(vectors[rows1], vectors[rows2]) / norms  # [pairs]
        first, second, gold = tasks[name]
        items = Pairs(cosine, gold)
        try:
            items.value()
        except ValueError as error:
            raise ValueError(f"{TASKS[name].label}: {error}") from error
        asked = fingerprint([*first, *second, *map(str, gold)])
        scores[name] = Score(name, _METRIC, items, asked)
    return scores


def report_rows(scores: Mapping[str, Score], *, comparable: bool = True) -> list[Row]:
    """Make the rows for the report, and the average once it is over the paper's seven tasks.

    The paper's figure stands only by a score over as many pairs with its protocol (``comparable``).
    """
    whole = {name for name, score in scores.items() if len(score.items) == TASKS[name].pairs}
    rows = []
    for name, score in scores.items():
        items = f"{len(score.items)}" + ("" if name in whole else f" of {TASKS[name].pairs}")
        rows.append(make_row(name, TASKS[name].label, items, [score], name in whole and comparable))
    if whole.issuperset(PAPER_TASKS):
        seven = [scores[name] for name in PAPER_TASKS]
        rows.append(make_row("sts-average", "STS average", "7 tasks", seven, comparable))
    return rows


def score(encoder: CachedEncoder, data: Mapping[str, StsPairs], protocol: Protocol) -> Report:
    """Score loaded tasks by a protocol of the command; raises what :func:`score_tasks` does."""
    paper = protocol == "paper"
    prompt = encoder.prompt(STS if paper else PLAIN, "document")
    encode = partial(encoder.embed, prompt=prompt, make=str, normalize=False)
    scores = score_tasks(encode, data, clean=clean_sentence if paper else str.strip)
    return Report({}, report_rows(scores, comparable=paper), list(scores.values()))
