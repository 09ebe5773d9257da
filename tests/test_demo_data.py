"""The triplets that ship with the project: their shape, and that they test what they claim to."""

import csv
import re
from collections import Counter
from pathlib import Path
from statistics import mean

import pytest

CONFIGS = Path(__file__).parents[1] / "e5v_jax" / "demo"
COLUMNS = ["scene", "sent0", "sent1", "hard_neg"]
SENTENCES = COLUMNS[1:]
Row = dict[str, str]


def read(name: str) -> list[Row]:
    with (CONFIGS / name).open(newline="", encoding="ascii") as file:  # a non-ASCII byte raises
        reader = csv.DictReader(file, strict=True)
        rows = list(reader)
    assert reader.fieldnames == COLUMNS
    return rows


@pytest.fixture(scope="module")
def train() -> list[Row]:
    return read("train.csv")


@pytest.fixture(scope="module")
def heldout() -> list[Row]:
    return read("heldout.csv")


def words(sentence: str) -> frozenset[str]:
    return frozenset(re.findall(r"[a-z0-9']+", sentence.lower()))


def jaccard(a: str, b: str) -> float:
    """Shared words over all words of the two sentences, 0 to 1."""
    return len(words(a) & words(b)) / len(words(a) | words(b))


def test_counts(train: list[Row], heldout: list[Row]) -> None:
    assert len(train) == 360
    assert len(heldout) == 100
    per_scene = Counter(row["scene"] for row in train)
    assert len(per_scene) >= 300
    assert max(per_scene.values()) <= 3
    assert len({row["scene"] for row in heldout}) == 100


def test_every_field_is_a_clean_sentence(train: list[Row], heldout: list[Row]) -> None:
    for row in train + heldout:
        assert list(row) == COLUMNS, row  # a surplus field appears under the key None
        assert re.fullmatch(r"[a-z0-9]+(_[a-z0-9]+)*", row["scene"]), row
        for column in SENTENCES:
            sentence = row[column]
            assert re.fullmatch(r"[A-Z0-9].*[^. ]\.|.* [ap]\.m\.", sentence), (row["scene"], column)
            assert "  " not in sentence, (row["scene"], column)
            assert 5 <= len(sentence.split()) <= 32, (row["scene"], column)
        assert 8 <= len(row["sent0"].split()) <= 20, row["scene"]


def test_no_sentence_appears_twice(train: list[Row], heldout: list[Row]) -> None:
    seen = Counter(
        " ".join(re.findall(r"[a-z0-9']+", row[column].lower()))
        for row in train + heldout
        for column in SENTENCES
    )
    assert [sentence for sentence, count in seen.items() if count > 1] == []


def test_train_and_heldout_share_no_scene(train: list[Row], heldout: list[Row]) -> None:
    assert {row["scene"] for row in train} & {row["scene"] for row in heldout} == set()


def test_no_heldout_sentence_resembles_a_train_sentence(
    train: list[Row], heldout: list[Row]
) -> None:
    known = [row[column] for row in train for column in SENTENCES]
    for row in heldout:
        closest = max(known, key=lambda sentence: jaccard(row["sent0"], sentence))
        assert jaccard(row["sent0"], closest) <= 0.5, (row["sent0"], closest)


@pytest.mark.parametrize("part", ["train", "heldout"])
def test_word_overlap_favours_the_hard_negative(part: str, request: pytest.FixtureRequest) -> None:
    """Counting shared words must not solve the task: the contradiction is the closer wording."""
    rows: list[Row] = request.getfixturevalue(part)
    paraphrase = [jaccard(row["sent0"], row["sent1"]) for row in rows]
    negative = [jaccard(row["sent0"], row["hard_neg"]) for row in rows]
    assert mean(negative) > mean(paraphrase)
    assert mean(paraphrase) < 0.3
    assert mean(negative) > 0.6
    assert min(negative) > 0.3  # one fact differs, so most of the wording stays
    fooled = mean(n > p for n, p in zip(negative, paraphrase, strict=True))
    assert fooled >= 0.9  # share of triplets that a bag of words gets wrong
