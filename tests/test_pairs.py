"""Training pairs from csv, jsonl, parquet and tensorflow-datasets."""

import csv
import importlib.resources
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from e5v_jax.data.nli import load_tfds, triplets_from_nli
from e5v_jax.data.pairs import TrainingPairs, load_pairs

ROWS = [
    ("A dog sits.", "An animal sits.", "A dog runs."),
    ('She said "no",\nthen left.', "Jürgen 走った, ça va\u2028?", " two  spaces "),
    ("a", "b", "c"),
]
COLUMNS = ("sent0", "sent1", "hard_neg")


def write(path: Path, rows: Sequence[Sequence[str]], columns: Sequence[str] = COLUMNS) -> Path:
    """Write the rows in the format that the suffix says."""
    if path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([columns, *rows])
    elif path.suffix == ".jsonl":
        lines = [json.dumps(dict(zip(columns, row, strict=True))) for row in rows]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    else:
        values = [list(column) for column in zip(*rows, strict=True)]
        pq.write_table(pa.table(dict(zip(columns, values, strict=True))), path)
    return path


def as_rows(triplets: TrainingPairs) -> list[tuple[str, ...]]:
    assert [side.column for side in triplets.sides] == list(COLUMNS[: len(triplets.sides)])
    return list(zip(*(side.texts or () for side in triplets.sides), strict=True))


def error_of(path: Path | Sequence[Path]) -> str:
    """The one-line message of the ValueError that reading ``path`` must raise."""
    with pytest.raises(ValueError) as info:
        load_pairs(path)
    message = str(info.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_formats_agree(tmp_path: Path, suffix: str) -> None:
    triplets = load_pairs(write(tmp_path / f"a{suffix}", ROWS))
    assert as_rows(triplets) == ROWS
    assert len(triplets) == 3
    assert triplets.fingerprint == load_pairs(write(tmp_path / "b.csv", ROWS)).fingerprint


def test_row_ids_are_where_an_editor_shows_the_row(tmp_path: Path) -> None:
    # the second row has a newline inside quotes, so the third starts on line 5, header included
    a = write(tmp_path / "a.csv", ROWS)
    assert load_pairs(a).row_ids == [f"{a}:2", f"{a}:3", f"{a}:5"]
    b = write(tmp_path / "b.jsonl", ROWS)
    assert load_pairs(b).row_ids == [f"{b}:1", f"{b}:2", f"{b}:3"]
    c = write(tmp_path / "c.parquet", ROWS)
    assert load_pairs(c).row_ids == [f"{c}:1", f"{c}:2", f"{c}:3"]
    blank = tmp_path / "blank.csv"
    blank.write_text("\nsent0,sent1\n\na,b\n\nc,d\n\n")
    assert load_pairs(blank).row_ids == [f"{blank}:4", f"{blank}:6"]


def test_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    def of(rows: Sequence[Sequence[str]], columns: Sequence[str] = COLUMNS) -> str:
        return load_pairs(write(tmp_path / "x.csv", rows, columns)).fingerprint

    seen = {of(ROWS), of(ROWS[::-1]), of(ROWS[:2]), of([("ab", "c", "d")]), of([("a", "bc", "d")])}
    seen |= {of([("a", "b", "c")]), of([("a", "b")], COLUMNS[:2]), of([("b", "a", "c")])}
    assert len(seen) == 8


def test_csv_with_bom_crlf_and_other_column_order(tmp_path: Path) -> None:
    path = tmp_path / "excel.csv"
    path.write_bytes('\ufeffhard_neg,sent0,sent1\r\nn,"a ""q"", x","b\r\nc"\r\n'.encode())
    assert as_rows(load_pairs(path)) == [('a "q", x', "b\r\nc", "n")]


def test_jsonl_with_bom_and_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes('\ufeff{"sent0": "a", "sent1": "b"}\r\n\n{"sent1":"d","sent0":"c"}'.encode())
    triplets = load_pairs(path)
    assert as_rows(triplets) == [("a", "b"), ("c", "d")]
    assert triplets.row_ids == [f"{path}:1", f"{path}:3"]


def test_parquet_string_types_and_folder_names(tmp_path: Path) -> None:
    # as polars and pandas write them; a folder named key=value adds no column
    folder = tmp_path / "split=train"
    folder.mkdir()
    table = pa.table(
        {
            "sent0": pa.array(["a", "b", "a"]).dictionary_encode(),
            "sent1": pa.array(["x", "y", "z"], pa.large_string()),
        }
    )
    pq.write_table(table, folder / "a.parquet")
    assert as_rows(load_pairs(folder / "a.parquet")) == [("a", "x"), ("b", "y"), ("a", "z")]
    more = table.append_column("hard_neg", table["sent1"]).append_column("length", [[1, 2, 3]])
    pq.write_table(more, folder / "b.parquet")
    assert len(load_pairs(folder / "b.parquet")) == 3  # a column passed over is of any type


def test_pairs_and_several_files(tmp_path: Path) -> None:
    a = write(tmp_path / "a.csv", [("a", "b")], COLUMNS[:2])
    b = write(tmp_path / "b.parquet", [("c", "d"), ("e", "f")], COLUMNS[:2])
    both = load_pairs([a, b])
    assert len(both.sides) == 2
    assert as_rows(both) == [("a", "b"), ("c", "d"), ("e", "f")]
    assert both.row_ids == [f"{a}:2", f"{b}:1", f"{b}:2"]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_column_errors(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    message = error_of(write(path, [("a", "b")], ["sent0", "text"]))
    assert str(path) in message and "no column sent1; found ['sent0', 'text']" in message
    message = error_of(write(path, ROWS, ["sent0", "sent1", "hard_negative"]))
    assert str(path) in message and "unknown column 'hard_negative' and no hard_neg" in message
    more = [("scene", *row) for row in ROWS]
    assert as_rows(load_pairs(write(path, more, ["scene", *COLUMNS]))) == ROWS


def test_repeated_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", ROWS, ["sent0", "sent1", "sent1"])
    assert error_of(path).startswith(f"{path}:1: a column is there twice")
    path = tmp_path / "a.jsonl"
    path.write_text('{"sent0": "a", "sent1": "b"}\n{"sent0": "a", "sent1": "b", "sent1": "c"}\n')
    assert error_of(path) == f"{path}:2: key 'sent1' is there twice"
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table([["a"], ["b"], ["c"]], names=["sent0", "sent1", "sent0"]), path)
    assert error_of(path).startswith(f"{path}: a column is there twice")


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("blank", ["", "  ", "\u00a0\t"])
def test_empty_sentence(tmp_path: Path, suffix: str, blank: str) -> None:
    path = write(tmp_path / f"a{suffix}", [ROWS[0], ("x", "y", blank)])
    row = {".csv": 3, ".jsonl": 2, ".parquet": 2}[suffix]
    assert error_of(path) == f"{path}:{row}: hard_neg is empty"


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_no_rows(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"a{suffix}", [])
    assert error_of(path) == f"{path}: no rows"
    path.write_text("")
    assert error_of(path) == f"{path}: no rows"


def test_no_rows_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({c: pa.array([], pa.string()) for c in COLUMNS}), path)
    assert error_of([write(tmp_path / "b.csv", ROWS), path]) == f"{path}: no rows"


def test_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "latin1.csv"
    path.write_bytes("sent0,sent1\na,b\nJürgen,x\n".encode("latin-1"))
    assert error_of(path) == f"{path}:3: not UTF-8 (byte 0xfc): save the file as UTF-8"
    path.write_bytes("sent0,sent1\na,b\n".encode("utf-16"))
    assert error_of(path) == f"{path}:1: not UTF-8 (byte 0xff): save the file as UTF-8"
    path = tmp_path / "latin1.jsonl"
    path.write_bytes(b'{"sent0": "a", "sent1": "b"}\n{"sent0": "\xfc", "sent1": "b"}\n')
    assert error_of(path) == f"{path}:2: not UTF-8 (byte 0xfc): save the file as UTF-8"
    path = tmp_path / "latin1.parquet"
    bad = pa.array([b"a", b"\xfc"]).view(pa.string())  # not checked by Arrow
    pq.write_table(pa.table({"sent0": ["a", "b"], "sent1": bad}), path)
    assert error_of(path) == f"{path}:2: sent1 is not UTF-8 (byte 0)"


def test_broken_csv(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('sent0,sent1\na,b\nc,"d\ne,f\n')  # the quote is never closed
    assert error_of(path).startswith(f"{path}:3: broken csv: ")
    path.write_text('sent0,sent1\na,b\n"c" d,e\n')
    assert error_of(path).startswith(f"{path}:3: broken csv: ")
    path.write_text("sent0,sent1\na,b\nc, with a comma,d\n")
    assert error_of(path) == f"{path}:3: 3 fields, expected 2: ['sent0', 'sent1']"
    path.write_text("sent0,sent1\na\n")
    assert error_of(path) == f"{path}:2: 1 fields, expected 2: ['sent0', 'sent1']"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"sent0": "a", "sent1": ', "broken json: Expecting value, character 24"),
        ('["a", "b"]', 'found ["a", "b"], expected an object'),
        ("null", "found null, expected an object"),
        ('{"sent0": "a"}', "no column sent1; found ['sent0']"),
        ('{"sent0": "a", "sent1": null}', "sent1 is null, expected a string"),
        ('{"sent0": 3, "sent1": "b"}', "sent0 is 3, expected a string"),
        ('{"sent0": "a", "sent1": {"x": "y"}}', 'sent1 is {"x": "y"}, expected a string'),
        (r'{"sent0": "a\ud800", "sent1": "b"}', "sent0 has half a character"),
    ],
)
def test_bad_json_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"sent0": "a", "sent1": "b"}\n' + line + "\n")
    assert error_of(path).startswith(f"{path}:2: {message}")


def test_bad_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"sent0": ["a", "b"], "sent1": ["c", None]}), path)
    assert error_of(path) == f"{path}:2: sent1 is null, expected a string"
    pq.write_table(pa.table({"sent0": ["a", "b"], "sent1": [1, 2]}), path)
    assert error_of(path) == f"{path}: column sent1 is of type int64, expected string"
    whole = write(path, ROWS).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert error_of(path).startswith(f"{path}: broken parquet: ")
    path.write_text("sent0,sent1\na,b\n")
    assert error_of(path).startswith(f"{path}: broken parquet: ")


def test_hard_neg_in_some_rows_only(tmp_path: Path) -> None:
    a = write(tmp_path / "a.csv", ROWS)
    b = write(tmp_path / "b.csv", [("a", "b")], COLUMNS[:2])
    for files, row in (([a, b], f"{b}:2"), ([b, a], f"{a}:2")):
        message = error_of(files)
        assert message.startswith(f"{row}: {a}:2 has a hard_neg and {b}:2 has none")
    path = tmp_path / "a.jsonl"
    path.write_text('{"sent0": "a", "sent1": "b"}\n{"sent0":"a","sent1":"b","hard_neg":"c"}\n')
    assert error_of(path).startswith(f"{path}:2: {path}:2 has a hard_neg and {path}:1 has none")


def test_bad_paths(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    assert error_of(path) == f"{path}: unknown suffix '.tsv', expected .csv, .jsonl, .parquet"
    assert error_of([]).startswith("no training file given")
    good = write(tmp_path / "a.csv", ROWS)
    assert error_of([good, good]).startswith(f"{good}: given twice")
    for missing in (tmp_path / "no.csv", tmp_path / "no.jsonl", tmp_path / "no.parquet"):
        with pytest.raises(FileNotFoundError, match=f"^{re.escape(str(missing))}: no such file$"):
            load_pairs(missing)


def test_shared_triplets(shared: Path) -> None:
    triplets = load_pairs([shared / "data/nli/triplets.csv", shared / "data/nli/triplets_snli.csv"])
    assert len(triplets) == 17_188 + 5_883
    assert as_rows(triplets)[0][1].startswith("It was a close fight, ending")
    assert triplets.row_ids[17_188].endswith("triplets_snli.csv:2")


# tensorflow-datasets

NLI = [  # premise, hypothesis, label
    ("A man eats.", "A person eats.", "entailment"),
    ("A man eats.", "Someone has food.", "entailment"),
    ("Only neutral.", "Maybe.", "neutral"),
    ("A cat.", "No cat.", "contradiction"),
    ("A man eats.", "Nobody eats.", "contradiction"),
    ("A man eats.", "Nobody.", "contradiction"),
    ("A cat.", "An animal, ü.", "entailment"),
    ("No hard one.", "Yes.", "entailment"),
    ("Unsure.", "Yes.", "entailment"),
    ("Unsure.", "No.", "-"),
]


def test_triplets_from_nli() -> None:
    triplets = triplets_from_nli(NLI, source="snli/train")
    assert as_rows(triplets) == [
        ("A man eats.", "A person eats.", "Nobody eats."),
        ("A cat.", "An animal, ü.", "No cat."),
    ]
    assert triplets.row_ids == ["snli/train:1", "snli/train:7"]
    blank = [("p", " ", "entailment"), ("p", "", "contradiction")]
    both = [("p", "yes", "entailment"), ("p", "no", "contradiction")]
    assert as_rows(triplets_from_nli(blank + both, "x")) == [("p", "yes", "no")]
    with pytest.raises(ValueError, match=r"^x: no premise has both"):
        triplets_from_nli(blank, "x")
    with pytest.raises(ValueError, match=r"^x:2: label 'Entailment', expected one of"):
        triplets_from_nli([("p", "h", "neutral"), ("p", "h", "Entailment")], "x")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data_dir where tfds's own snli builder prepared ``NLI``, without TensorFlow."""
    import tensorflow_datasets as tfds

    assert "tensorflow" not in sys.modules
    raw = tmp_path_factory.mktemp("raw")
    (raw / "snli_1.0").mkdir()
    head = "gold_label\tsentence1\tsentence2\n"
    for split, rows in {"train": NLI, "dev": NLI[:7], "test": NLI[:3]}.items():
        lines = [f"{label}\t{premise}\t{hypothesis}\n" for premise, hypothesis, label in rows]
        (raw / f"snli_1.0/snli_1.0_{split}.txt").write_text(head + "".join(lines), encoding="utf-8")
    data_dir = tmp_path_factory.mktemp("tfds")
    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("importlib_resources") is None:  # tfds forgets to require it
            patch.setitem(sys.modules, "importlib_resources", importlib.resources)
        manager = tfds.download.DownloadManager
        patch.setattr(manager, "download_and_extract", lambda self, url: str(raw))
        builder = tfds.builder("snli", data_dir=str(data_dir), file_format="array_record")
        builder.download_and_prepare()
    return data_dir


def test_load_tfds(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    triplets = load_tfds("snli", data_dir=prepared)
    # tfds shuffles as it writes, so any entailment of a premise may be the first
    allowed = {
        (p, e, c)
        for p, e, label in NLI
        if label == "entailment"
        for q, c, other in NLI
        if q == p and other == "contradiction"
    }
    assert set(as_rows(triplets)) <= allowed
    assert sorted(row[0] for row in as_rows(triplets)) == ["A cat.", "A man eats."]
    assert len(triplets.sides) == 3
    assert all(row.startswith("snli/1.1.0/train:") for row in triplets.row_ids)
    assert load_tfds("snli", data_dir=prepared) == triplets
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared))
    assert load_tfds("snli", "train[:100%]").fingerprint == triplets.fingerprint
    assert len(load_tfds("snli", "validation")) == 2
    assert "tensorflow" not in sys.modules


def test_load_tfds_reads_the_newest_version(prepared: Path, tmp_path: Path) -> None:
    for version in ("1.9.0", "1.10.0", "incomplete.ABC_2.0.0"):
        shutil.copytree(prepared / "snli/1.1.0", tmp_path / "snli" / version)
    assert load_tfds("snli", data_dir=tmp_path).row_ids[0].startswith("snli/1.10.0/train:")


def test_load_tfds_errors(prepared: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"snli/1\.1\.0: no split 'dev'; found test, train, val"):
        load_tfds("snli", "dev", data_dir=prepared)
    with pytest.raises(ValueError, match=r"^snli/1.1.0/test: no premise has both"):
        load_tfds("snli", "test", data_dir=prepared)
    missing: list[tuple[Any, str]] = [
        ("snli", "pip install importlib_resources && "),
        ("multi_nli", "pip install tensorflow importlib_resources && "),
    ]
    for name, install in missing:
        with pytest.raises(FileNotFoundError) as info:
            load_tfds(name, data_dir=tmp_path)
        message = str(info.value)
        assert message.startswith(f"{tmp_path / name}: not prepared; ") and "\n" not in message
        assert install in message
        assert f"tfds.builder('{name}', data_dir='{tmp_path}', file_format='array_rec" in message
    # as TensorFlow users have it by default
    info_file = shutil.copytree(prepared / "snli", tmp_path / "snli") / "1.1.0/dataset_info.json"
    info_file.write_text(info_file.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(ValueError, match=r"a format that only TensorFlow reads.*download_and_pr"):
        load_tfds("snli", data_dir=tmp_path)


def test_tfds_is_imported_only_when_asked_for() -> None:
    code = "import sys, e5v_jax.data.pairs; sys.exit('tensorflow_datasets' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
