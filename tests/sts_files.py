"""STS files of a few rows, and an encoder whose scores are known, for the tests of STS."""

import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from e5v_jax.evaluate.scores import Score
from e5v_jax.evaluate.sts import (
    Encode,
    load_task,
    score_tasks,
)

STSB = "STS/STSBenchmark/sts-test.csv"


def evaluate_sts(encode: Encode, data: Path, tasks: Sequence[str]) -> dict[str, Score]:
    return score_tasks(encode, {name: load_task(data, name) for name in tasks})


def bag_of_words(sentences: list[str]) -> np.ndarray:
    """Word counts in 256 buckets. Counts, as their dot products are exact: ties stay ties."""
    vectors = np.zeros((len(sentences), 256), np.float32)
    for row, sentence in enumerate(sentences):
        for word in sentence.split():
            vectors[row, zlib.crc32(word.encode()) % 256] += 1
    return vectors


def write_years(root: Path) -> Path:
    """A small STS13 with rows of every kind, STS-B and SICK test sets."""
    folder = root / "STS" / "STS13-en-test"
    folder.mkdir(parents=True)
    for subset in ("FNWN", "headlines", "OnWN"):
        rows = [
            f"{subset} one\ttwo \x85 words",
            "dropped\tno score",
            f"a b\t{subset} a b",
            "a dog\ta  dog .",
        ]
        (folder / f"STS.input.{subset}.txt").write_text("\n".join(rows) + "\n", encoding="utf-8")
        (folder / f"STS.gs.{subset}.txt").write_text("0.5\n\n3\n5\n")
    (folder / "STS.gs.SMT.txt").write_text("1\n2\n")  # scores without sentences, as in the data
    stsb = root / "STS" / "STSBenchmark"
    stsb.mkdir()
    (stsb / "sts-test.csv").write_text(
        "news\tx\t2012\t0001\t4.5\ta b\ta c\nnews\tx\t2012\t0002\t0\ta b\td e\tsource\tsource\n"
    )
    (root / "SICK").mkdir()
    (root / "SICK" / "SICK_test_annotated.txt").write_bytes(
        b"pair_ID\tsentence_A\tsentence_B\trelatedness_score\tentailment_judgment\r\n"
        b"6\ta b\ta c\t3.3\tNEUTRAL\r\n7\ta b\td e\t1\tNEUTRAL\r\n"
    )
    return root
