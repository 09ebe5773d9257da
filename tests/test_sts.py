"""STS evaluation: SentEval's files and scores, damaged files and the report."""

import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
from sts_files import STSB, bag_of_words, evaluate_sts, write_years

from e5v_jax.data.inputs import InputError
from e5v_jax.evaluate.scores import Pairs
from e5v_jax.evaluate.sts import (
    PAPER_TASKS,
    TASKS,
    StsPairs,
    clean_sentence,
    load_task,
    report_rows,
    score_tasks,
)

# Pairs after dropping blank gold scores, counted when the data was put together.
ROWS = {
    "sts12": 3108,
    "sts13": 1500,
    "sts14": 3750,
    "sts15": 3000,
    "sts16": 1186,
    "stsb": 1379,
    "stsb-dev": 1500,
    "sickr": 4927,
}


@pytest.mark.parametrize("name", ROWS)
def test_real_files_have_the_published_number_of_pairs(sts_data: Path, name: str) -> None:
    pairs = load_task(sts_data, name)
    assert len(pairs.sentences1) == len(pairs.sentences2) == len(pairs.gold) == ROWS[name]
    assert TASKS[name].pairs == ROWS[name]
    assert pairs.gold.dtype == np.float64
    assert pairs.gold.min() >= 0 and 4.8 <= pairs.gold.max() <= 5


def test_every_task_is_tested() -> None:
    assert set(ROWS) == set(TASKS)


SENTEVAL_SUBSETS = {  # senteval/sts.py
    "STS12": ["MSRpar", "MSRvid", "SMTeuroparl", "surprise.OnWN", "surprise.SMTnews"],
    "STS13": ["FNWN", "headlines", "OnWN"],
    "STS14": ["deft-forum", "deft-news", "headlines", "images", "OnWN", "tweet-news"],
    "STS15": ["answers-forums", "answers-students", "belief", "headlines", "images"],
    "STS16": ["answer-answer", "headlines", "plagiarism", "postediting", "question-question"],
}


def senteval_pairs(root: Path, name: str) -> list[tuple[list[str], list[str], float]]:
    """Words, words, score, read the way SentEval (SimCSE's copy) reads them."""
    if name.upper() in SENTEVAL_SUBSETS:
        pairs = []
        for dataset in SENTEVAL_SUBSETS[name.upper()]:
            folder = root / "STS" / f"{name.upper()}-en-test"
            lines = (folder / f"STS.input.{dataset}.txt").read_text(encoding="utf8").splitlines()
            raw = (folder / f"STS.gs.{dataset}.txt").read_text(encoding="utf8").splitlines()
            for line, score in zip(lines, raw, strict=True):
                first, second = line.split("\t")
                if score != "":
                    pairs.append((first.split(), second.split(), float(score)))
        return pairs
    if name == "sickr":
        path, columns, skip = root / "SICK" / "SICK_test_annotated.txt", (1, 2, 3), 1
    else:
        path, columns, skip = root / "STS" / "STSBenchmark" / "sts-test.csv", (5, 6, 4), 0
    fields = [line.strip().split("\t") for line in path.open(encoding="utf-8")][skip:]
    first, second, score = columns
    return [(f[first].split(), f[second].split(), float(f[score])) for f in fields]


def eval_sts_sentence(words: list[str]) -> str:
    """The authors' eval_sts.py, line by line."""
    s = " ".join(words)
    if len(s) > 0 and s[-1] not in ".?\"'":
        s += "."
    s = s.replace('"', "'")
    if len(s) > 0 and s[-1] == "?":
        s = s[:-1] + "."
    return s


def test_scores_are_senteval_s(sts_data: Path) -> None:
    scores = evaluate_sts(bag_of_words, sts_data, PAPER_TASKS)
    assert list(scores) == ["sts12", "sts13", "sts14", "sts15", "sts16", "stsb", "sickr"]
    for name, score in scores.items():
        cosines, gold = [], []
        for first, second, value in senteval_pairs(sts_data, name):
            u, v = bag_of_words([eval_sts_sentence(first), eval_sts_sentence(second)]).astype(int)
            cosines.append(float(u @ v) / math.sqrt(int(u @ u) * int(v @ v)))
            gold.append(value)
        expected = 100 * scipy.stats.spearmanr(cosines, gold).statistic
        assert len(score.items) == len(gold)
        assert score.items.value() == pytest.approx(expected, abs=1e-9), name
        assert 20 < score.items.value() < 90  # shared words say something, but not all


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("a dog", "a dog."),
        ("a  dog\t.\xa0", "a dog ."),
        ("a dog ?", "a dog ."),
        ("is it a dog?", "is it a dog."),
        ('he said " no "', "he said ' no '"),
        ("the dogs'", "the dogs'"),
        ('" why ?"', "' why ?'"),
        ("a dog!", "a dog!."),
        ("why??", "why?."),
    ],
)
def test_clean_sentence(sentence: str, expected: str) -> None:
    assert clean_sentence(sentence) == expected
    assert eval_sts_sentence(sentence.split()) == expected


def test_stride_takes_every_nth_pair(sts_data: Path) -> None:
    whole = load_task(sts_data, "stsb-dev")
    part = load_task(sts_data, "stsb-dev", stride=5)
    assert part.sentences1 == whole.sentences1[::5]
    assert part.sentences2 == whole.sentences2[::5]
    assert np.array_equal(part.gold, whole.gold[::5])
    assert len(part.gold) == 300


def test_small_files(tmp_path: Path) -> None:
    root = write_years(tmp_path)
    first, second, gold = load_task(root, "sts13")
    assert first[:4] == ["FNWN one", "a b", "a dog", "headlines one"]
    assert second[0] == "two \x85 words"  # not a line break
    assert gold.tolist() == [0.5, 3, 5] * 3
    assert load_task(root, "stsb").gold.tolist() == [4.5, 0]
    assert load_task(root, "sickr").sentences2 == ["a c", "d e"]


def test_each_distinct_sentence_is_encoded_once(tmp_path: Path) -> None:
    calls: list[list[str]] = []

    def encode(sentences: list[str]) -> np.ndarray:
        calls.append(sentences)
        return bag_of_words(sentences)

    evaluate_sts(encode, write_years(tmp_path), ["sts13", "stsb", "sickr"])
    (sentences,) = calls
    assert len(sentences) == len(set(sentences)) == 12
    assert sentences.count("a dog.") == sentences.count("a dog .") == 1
    assert not any("dropped" in s for s in sentences)


def test_same_sentence_twice_ties_at_one(sts_data: Path) -> None:
    """Rounding must not order pairs of equal sentences, whatever their vectors."""
    sentences = load_task(sts_data, "stsb").sentences1[:200]
    texts = [f"{s} {i}" for i, s in enumerate(sentences)]
    vectors = dict(zip(texts, np.random.default_rng(0).normal(size=(200, 576)), strict=True))

    def encode(cleaned: list[str]) -> np.ndarray:
        return np.array([vectors[s.removesuffix(".")] for s in cleaned], np.float32)

    others = [*texts[:100], *texts[:100]]
    gold = np.array([5.0] * 100 + [0.0] * 100)
    tasks = {"stsb": StsPairs(texts, others, gold)}
    # 100 ties against 100 distinct values: exactly this, and less if rounding broke the ties
    expected = scipy.stats.spearmanr([1.0] * 100 + [i / 200 for i in range(100)], gold).statistic
    assert score_tasks(encode, tasks)["stsb"].items.value() == pytest.approx(
        100 * expected, abs=1e-9
    )


def no_vector(sentences: list[str]) -> np.ndarray:
    vectors = bag_of_words(sentences)
    vectors[1] = 0
    return vectors


def not_a_number(sentences: list[str]) -> np.ndarray:
    vectors = bag_of_words(sentences)
    vectors[1, 5] = np.nan
    return vectors


def refusing(sentences: list[str]) -> np.ndarray:
    raise InputError(1, "its vector is not finite")


@pytest.mark.parametrize(
    ("encode", "message"),
    [
        (refusing, r"'d e\.': its vector is not finite$"),
        (no_vector, r"1 of 4 sentences are zero or not finite, first that of 'd e\.'"),
        (not_a_number, r"1 of 4 sentences are zero or not finite, first that of 'd e\.'"),
        (lambda s: bag_of_words(s)[1:], r"shape \(3, 256\), expected \(4, dimensions\)"),
        (lambda s: np.ones((len(s), 8)), r"STS-B: .*all 2 values are 1"),
    ],
)
def test_bad_embeddings_are_refused(tmp_path: Path, encode: Any, message: str) -> None:
    root = write_years(tmp_path)
    path = root / "STS" / "STSBenchmark" / "sts-test.csv"
    path.write_text("news\tx\t2012\t1\t4.5\ta b\ta c\nnews\tx\t2012\t2\t0\td e\tf g\n")
    with pytest.raises(ValueError, match=message):
        evaluate_sts(encode, root, ["stsb"])


HEADER = "pair_ID\tsentence_A\tsentence_B\trelatedness_score\n"
YEAR = "STS/STS13-en-test"

SICK = "SICK/SICK_test_annotated.txt"


@pytest.mark.parametrize(
    ("task", "file", "content", "message"),
    [
        (
            "sts13",
            f"{YEAR}/STS.gs.OnWN.txt",
            b"1\n\n3\n",
            "3 rows, expected 4 as in STS.input.OnWN",
        ),
        ("sts13", f"{YEAR}/STS.gs.OnWN.txt", b"1\n\n3\nx\n", "row 4: score 'x', expected a number"),
        ("sts13", f"{YEAR}/STS.gs.OnWN.txt", b"1\n\nnan\n2\n", "row 3: score 'nan', expected"),
        ("sts13", f"{YEAR}/STS.gs.OnWN.txt", b"1\n\n50\n2\n", "row 3: score '50', expected"),
        ("sts13", f"{YEAR}/STS.input.OnWN.txt", b"a\tb\n" * 3, "4 rows, expected 3"),
        ("sts13", f"{YEAR}/STS.input.OnWN.txt", b"a\tb\na\tb\na\na\tb\n", "row 3: 1 tab-separated"),
        ("sts13", f"{YEAR}/STS.input.OnWN.txt", b"a\tb\na\tb\na\tb\nc\td\te\n", "row 4: 3 tab-sep"),
        ("sts13", f"{YEAR}/STS.input.OnWN.txt", b"a\tb\na\tb\na\t \na\tb\n", "row 3: empty sent"),
        ("sts13", f"{YEAR}/STS.input.OnWN.txt", b"a\tb\na\tb\na\t\xff\na\tb\n", "row 3: .*UTF-8"),
        ("sts13", f"{YEAR}/STS.gs.OnWN.txt", b"\n\n\n\n", "OnWN.txt: no score, expected one a row"),
        ("sts13", f"{YEAR}/STS.input.OnWN.txt", None, "not found; .* must contain STS/ and SICK/"),
        ("sts13", f"{YEAR}/STS.gs.FNWN.txt", None, "not found; .* must contain STS/ and SICK/"),
        ("stsb", STSB, b"news\tx\t2012\t1\t4.5\ta b\n", "row 1: 6 tab-separated .* at least 7"),
        ("stsb", STSB, b"n\tx\t2012\t1\t\ta b\ta\n", "row 1: score '', expected a number"),
        ("stsb", STSB, b"n\tx\t2012\t1\t1\ta b\ta\n", "stsb has 1 scored pairs, expected at least"),
        ("stsb", STSB, None, "not found; .* must contain STS/ and SICK/"),
        ("sickr", SICK, b"", "row 1: found '', expected the columns pair_ID, sentence_A"),
        ("sickr", SICK, b"1\ta b\ta c\t3.3\n", "row 1: found .*expected the columns pair_ID"),
        ("sickr", SICK, HEADER.encode() + b"1\ta b\ta c\n", "row 2: 3 tab-separated fields"),
        ("sickr", SICK, HEADER.encode() + b"1\ta b\ta c\tNEUTRAL\n", "row 2: score 'NEUTRAL'"),
        ("sickr", SICK, HEADER.encode(), "sickr has 0 scored pairs"),
    ],
)
def test_damaged_files(
    tmp_path: Path, task: str, file: str, content: bytes | None, message: str
) -> None:
    root = write_years(tmp_path)
    load_task(root, task)  # whole so far
    if content is None:
        (root / file).unlink()
    else:
        (root / file).write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        load_task(root, task)
    assert "\n" not in str(error.value)
    if "scored pairs" not in message:
        named = Path(str(error.value).split(":")[0].split(",")[0])
        assert named.parent == (root / file).parent


def test_an_empty_subset_is_no_subset(tmp_path: Path) -> None:
    root = write_years(tmp_path)
    for kind in ("input", "gs"):
        (root / YEAR / f"STS.{kind}.OnWN.txt").write_text("")
    with pytest.raises(ValueError, match=r"STS\.gs\.OnWN\.txt: no score, expected one a row"):
        load_task(root, "sts13")


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    root = write_years(tmp_path)
    (root / STSB).unlink()
    os.mkfifo(root / STSB)
    with pytest.raises(ValueError, match=r"sts-test\.csv: no file, but a folder, a pipe or the"):
        load_task(root, "stsb")


def test_unknown_task(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'sts17': expected one of sts12, .*stsb-dev"):
        load_task(tmp_path, "sts17")


def test_report_rows_show_the_paper_only_beside_whole_tasks(sts_data: Path) -> None:
    scores = evaluate_sts(bag_of_words, sts_data, PAPER_TASKS)
    rows = report_rows(scores)
    assert [row.label for row in rows[:2]] == ["STS12", "STS13"]
    assert [row.published.paper for row in rows] == [
        *(80.03, 89.94, 85.67, 89.09, 85.89, 87.88, 83.51),
        86.00,
    ]
    assert rows[-1].value == pytest.approx(np.mean([s.items.value() for s in scores.values()]))
    assert [row.published.prompt_only for row in rows] == [None] * 7 + [75.8]

    stsb = scores["stsb"].items
    assert isinstance(stsb, Pairs)
    fewer = Pairs(stsb.cosine[:276], stsb.gold[:276])
    part = report_rows({**scores, "stsb": replace(scores["stsb"], items=fewer)})
    assert (part[5].items, part[5].published.paper) == ("276 of 1379", None)
    assert [row.task for row in part] == list(PAPER_TASKS)  # no average
