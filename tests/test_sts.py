"""STS evaluation: SentEval's files and scores, damaged files, the report and the command."""

import json
import math
import os
import shutil
import subprocess
import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.stats

import e5v_jax
from e5v_jax import cli
from e5v_jax.data.inputs import InputError
from e5v_jax.evaluate.command import evaluate
from e5v_jax.evaluate.config import EvaluateConfig
from e5v_jax.evaluate.files import any_text
from e5v_jax.evaluate.scores import Pairs, Score
from e5v_jax.evaluate.sts import (
    PAPER_TASKS,
    TASKS,
    Encode,
    StsPairs,
    clean_sentence,
    load_task,
    report_rows,
    score_tasks,
)
from e5v_jax.evaluate.tasks import choose_tasks
from e5v_jax.presets import E5_V
from e5v_jax.prompts import PROMPTS


@pytest.fixture(scope="session")
def sts_data(shared: Path) -> Path:
    return shared / "data" / "sts"


def evaluate_sts(encode: Encode, data: Path, tasks: Sequence[str]) -> dict[str, Score]:
    return score_tasks(encode, {name: load_task(data, name) for name in tasks})


def bag_of_words(sentences: list[str]) -> np.ndarray:
    """Word counts in 256 buckets. Counts, as their dot products are exact: ties stay ties."""
    vectors = np.zeros((len(sentences), 256), np.float32)
    for row, sentence in enumerate(sentences):
        for word in sentence.split():
            vectors[row, zlib.crc32(word.encode()) % 256] += 1
    return vectors


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
STSB = "STS/STSBenchmark/sts-test.csv"
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


def test_choose_tasks() -> None:
    assert choose_tasks("sts") == list(PAPER_TASKS)
    assert choose_tasks("stsb-dev, stsb,sts12,stsb") == ["stsb-dev", "stsb", "sts12"]
    assert choose_tasks("sickr,sts")[:2] == ["sickr", "sts12"]
    assert len(choose_tasks("sickr,sts")) == 7
    assert choose_tasks("fashioniq") == [f"fashioniq-{t}" for t in ("dress", "shirt", "toptee")]
    for text in ("sts17", "stsb,STSB", "", " , "):
        with pytest.raises(cli.UsageError, match="--tasks"):
            choose_tasks(text)


class FakeE5V:
    """Has the methods of E5V that the command uses, and keeps what it was called with."""

    template = "chatml"
    preset = E5_V
    loaded: dict[str, Any]
    encoded: dict[str, Any]

    @staticmethod
    def load_processor(*_: Any, **__: Any) -> Any:
        return SimpleNamespace(check_text=any_text)

    @classmethod
    def from_pretrained(cls, path: str, **options: Any) -> "FakeE5V":
        cls.loaded = {"path": path, **options}
        return cls()

    def encode(self, sentences: list[str], **options: Any) -> np.ndarray:
        type(self).encoded = options
        return bag_of_words(sentences)


@pytest.fixture
def fake_model(monkeypatch: pytest.MonkeyPatch) -> type[FakeE5V]:
    monkeypatch.setitem(vars(e5v_jax), "E5V", FakeE5V)
    return FakeE5V


def test_command_writes_the_results(
    tmp_path: Path, sts_data: Path, fake_model: type[FakeE5V], capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "results"
    evaluate(
        EvaluateConfig(
            model="a-model",
            data=sts_data,
            tasks="stsb,stsb-dev",
            output=output,
            adapter=Path("run"),
            template="mistral",
            dtype="float32",
            quantize="int8",
            attn_implementation="xla",
            revision="v2",
            batch_size=7,
        )
    )
    assert dict(fake_model.loaded.pop("mesh").shape) == {"data": 1, "fsdp": 1, "tensor": 1}
    assert fake_model.loaded == {
        "verify": False,
        "path": "a-model",
        "dtype": "float32",
        "adapter": Path("run"),
        "preset": None,
        "min_pixels": None,
        "max_pixels": None,
        "template": "mistral",
        "quantize": "int8",
        "attn_implementation": "xla",
        "revision": "v2",
    }
    assert fake_model.encoded == {
        "prompt": PROMPTS["sts"],
        "batch_size": 7,
        "normalize_embeddings": False,  # the cache keeps vectors as they are
        "show_progress_bar": False,
    }
    content = json.loads((output / "results.json").read_text())
    expected = evaluate_sts(bag_of_words, sts_data, ["stsb", "stsb-dev"])
    assert [r["task"] for r in content["results"]] == ["stsb", "stsb-dev"]
    assert [r["value"] for r in content["results"]] == [s.items.value() for s in expected.values()]
    assert content["settings"]["template"] == "chatml"  # the model's own word on it
    assert content["settings"]["adapter"] == "run"
    shown = f"{expected['stsb'].items.value():.2f}"
    assert shown in (output / "results.md").read_text()
    table = capsys.readouterr().out
    assert shown in table and "87.88" in table
    assert [p.name for p in output.parent.iterdir()] == ["results"]  # no temporary left


def test_plain_protocol(
    tmp_path: Path,
    sts_data: Path,
    fake_model: type[FakeE5V],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The yardstick for training: sentences as they are, and no figure of the paper beside it."""
    seen: list[str] = []

    def encode(self: FakeE5V, sentences: list[str], **options: Any) -> np.ndarray:
        FakeE5V.encoded = options
        seen.extend(sentences)
        return bag_of_words(sentences)

    monkeypatch.setattr(fake_model, "encode", encode)
    output = tmp_path / "out"
    evaluate(
        EvaluateConfig(model="m", data=sts_data, tasks="stsb", protocol="plain", output=output)
    )
    assert fake_model.encoded["prompt"] == "<sent>\nSummary above sentence in one word:"
    first, second, _ = load_task(sts_data, "stsb")
    assert set(seen) == {*first, *second}
    (result,) = json.loads((output / "results.json").read_text())["results"]
    assert result["items"] == "1379" and result["published"]["paper"] is None


def test_command_refuses_a_full_folder_and_fills_an_empty_one(
    tmp_path: Path, fake_model: type[FakeE5V]
) -> None:
    root = write_years(tmp_path / "data")
    args = EvaluateConfig(model="m", data=root, tasks="stsb", output=tmp_path / "out")
    (tmp_path / "out").mkdir()
    evaluate(args)
    before = (tmp_path / "out" / "results.json").read_bytes()
    with pytest.raises(FileExistsError, match="out: already exists"):
        evaluate(args)
    assert (tmp_path / "out" / "results.json").read_bytes() == before


def test_command_leaves_nothing_behind_on_failure(
    tmp_path: Path, fake_model: type[FakeE5V], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_years(tmp_path / "data")
    monkeypatch.setattr(fake_model, "encode", lambda self, sentences, **_: np.zeros((1, 1)))
    with pytest.raises(ValueError, match="embeddings have shape"):
        evaluate(EvaluateConfig(model="m", data=root, tasks="stsb", output=tmp_path / "out"))
    assert [p.name for p in tmp_path.iterdir()] == ["data"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stride": 0}, "--stride: 0"),
        ({"batch_size": 0}, "--batch-size: 0"),
        ({"template": "llama9"}, "--template: unknown 'llama9', expected one of llama3"),
    ],
)
def test_impossible_flags(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    root = write_years(tmp_path)
    with pytest.raises(cli.UsageError, match=message):
        evaluate(EvaluateConfig(model="m", data=root, tasks="stsb", **change))


def run_command(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "e5v_jax.evaluate", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_exit_codes_and_one_line_errors(tmp_path: Path) -> None:
    missing = run_command("--model", "m", "--data", str(tmp_path), "--tasks", "stsb")
    assert missing.returncode == 1
    (line,) = missing.stderr.splitlines()
    assert line.startswith(f"error: {tmp_path / STSB}: not found; the data folder must contain")

    shutil.rmtree(tmp_path)
    unknown = run_command("--model", "m", "--data", str(tmp_path), "--tasks", "nonsense")
    assert unknown.returncode == 2
    (line,) = unknown.stderr.splitlines()
    assert line.startswith("error: --tasks: unknown task 'nonsense', expected of sts, fashioniq, ")

    traced = run_command("--model", "m", "--data", str(tmp_path), "--traceback")
    assert traced.returncode == 1
    assert "Traceback" in traced.stderr and "FileNotFoundError" in traced.stderr

    usage = run_command("--model", "m")
    assert usage.returncode == 2
    assert "--data" in usage.stderr and "Traceback" not in usage.stderr

    listed = run_command("--help")
    assert listed.returncode == 0
    assert "python -m e5v_jax.evaluate" in listed.stdout
    for flag in ("--tasks", "--adapter", "--traceback", "stsb-dev"):
        assert flag in listed.stdout


@dataclass(frozen=True)
class Nested:
    rate: float = 0.5


@dataclass(frozen=True)
class Flags:
    """Do a thing."""

    name: str
    nested: Nested = Nested()


def outcome(main: Any, *words: str, default: Flags | None = None) -> Any:
    with pytest.raises(SystemExit) as exit_:
        cli.run(main, Flags, argv=words, default=default)
    return exit_.value.code


def test_run_parses_nested_flags_and_defaults() -> None:
    seen: list[Flags] = []
    assert outcome(seen.append, "--name", "x", "--nested.rate", "2") == 0
    assert outcome(seen.append, "--name", "z", default=Flags("y", Nested(3))) == 0
    assert outcome(seen.append, default=Flags("y", Nested(3))) == 0
    assert seen == [Flags("x", Nested(2)), Flags("z", Nested(3)), Flags("y", Nested(3))]
    assert outcome(seen.append) == 2  # --name is missing
    assert len(seen) == 3


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("a.csv, row 3:\n  bad"), 1, "error: a.csv, row 3: bad"),
        (cli.UsageError("--x: bad"), 2, "error: --x: bad"),
        (FileNotFoundError(2, "No such file or directory", "a.csv"), 1, "error: a.csv: No such"),
        (KeyError("k"), 1, "error: KeyError: 'k' (--traceback shows where)"),
        (RuntimeError("first\nsecond"), 1, "error: RuntimeError: first (--traceback shows where)"),
        (MemoryError(), 1, "error: MemoryError (--traceback shows where)"),
        (ValueError(), 1, "error: ValueError (--traceback shows where)"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_errors_are_one_line(
    error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(_: Flags) -> None:
        raise error

    assert outcome(main, "--name", "x") == code
    (shown,) = capsys.readouterr().err.splitlines()
    assert shown.startswith(line)
