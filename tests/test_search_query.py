"""Queries: what words and signs mean, what is found, and the commands with a small model."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image
from search_fakes import content_of, draw, embed_all, embed_one

from e5v_jax import E5V
from e5v_jax.lock import hold
from e5v_jax.search.__main__ import main
from e5v_jax.search.index import update
from e5v_jax.search.query import (
    DUPLICATE,
    QueryError,
    Term,
    combine,
    embed_terms,
    find,
    parse_terms,
)
from e5v_jax.search.scan import File, Part
from e5v_jax.search.store import Store
from e5v_jax.search.writer import Writer

if TYPE_CHECKING:
    from hf_models import Case


# --- what is asked for ---------------------------------------------------------------------------


def test_terms(tmp_path: Path) -> None:
    dog = draw(tmp_path / "dog.jpg", 0)
    assert parse_terms(["a dog"]) == [Term("a dog")]
    assert parse_terms([str(dog)]) == [Term(dog)]
    assert parse_terms([str(dog), " at night "]) == [Term({"text": "at night", "image": dog})]
    words = ["a dog", "+", "snow", "-0.3", str(dog), "+2", "x", "-", "y", "\N{MINUS SIGN}.25", "z"]
    assert parse_terms(words) == [
        Term("a dog"),
        Term("snow", weight=0.5),
        Term(dog, weight=-0.3),
        Term("x", weight=2.0),
        Term("y", weight=-0.5),
        Term("z", weight=-0.25),
    ]


def test_a_photograph_of_a_query_is_turned(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    draw(tmp_path / "dog.jpg", 0, exif=exif)
    (term,) = parse_terms([str(tmp_path / "dog.jpg"), "at night"])
    assert isinstance(term.item, dict) and term.item["image"].size == (40, 60)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to search for: give words, a photograph, or both, first"),
        (["-", "snow"], "nothing to search for: give words"),
        (["a dog", "+"], "a + or - has nothing behind it"),
        (["a dog", "in snow"], "two texts side by side: quote them as one"),
        (["no/such.jpg"], "no/such.jpg: no such file"),
        ([" "], "the text is empty"),
    ],
)
def test_queries_that_are_none(words: list[str], message: str) -> None:
    with pytest.raises(QueryError, match=message.replace("+", "[+]")):
        parse_terms(words)


# --- what is found -------------------------------------------------------------------------------


@pytest.fixture
def vectors() -> np.ndarray:
    """500 unit vectors [500, 24]; those from 400 on are nearly those from 0 on."""
    vectors = np.random.default_rng(0).standard_normal((500, 24))
    vectors[400:] = vectors[:100] + 0.02 * vectors[400:]
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def store(vectors: np.ndarray, tmp_path: Path) -> Writer:
    """A text for each; every third file is dropped again, and two have equal contents."""
    writer = Writer(tmp_path / "index")
    with writer.commit():
        writer.add_vectors([f"content {number}" for number in range(500)], vectors)
        for number in range(500):
            part = Part(f"content {number}", "text", 1, f"text {number}")
            writer.put_file(File(f"/{number:03}", 1, 1, str(number)), [part], None)
        part = Part("content 4", "text", 1, "text 4")
        writer.put_file(File("/copy-of-4", 1, 1, "4"), [part], None)
        known = writer.known_files()
        writer.drop_files(known[f"/{number:03}"][0] for number in range(0, 500, 3))
    return writer


def test_every_row_is_compared(store: Writer, vectors: np.ndarray) -> None:
    """The best as NumPy finds them by brute force; none that was dropped; copies together."""
    halves = vectors.astype(np.float16).astype(np.float32)
    for seed in range(20):
        vector = embed_one(f"query {seed}")
        scores = halves @ vector
        order = [i for i in np.argsort(-scores) if i % 3]
        with store.reading() as now:
            for top in (1, 7, 1000):
                hits = [hit for hit in find(now, vector, top) if hit.row.path != "/copy-of-4"]
                assert [int(hit.row.path[1:]) for hit in hits] == order[:top][: len(hits)]
                np.testing.assert_allclose(
                    [hit.score for hit in hits], scores[order[: len(hits)]], atol=1e-6
                )
            assert len(find(now, vector, 1000)) == len(order) + 1
            above = find(now, vector, 1000, threshold=0.2)
            assert len(above) == (scores[order] >= 0.2).sum() + (scores[4] >= 0.2)
    with store.reading() as now:
        both = find(now, vectors[4], 2)
    assert [hit.row.path for hit in both] == ["/004", "/copy-of-4"]


def test_near_duplicates_are_hidden(store: Writer, vectors: np.ndarray) -> None:
    with store.reading() as now:
        plain = find(now, vectors[4], 5)
        hidden = find(now, vectors[4], 5, duplicates=DUPLICATE)
        every = find(now, vectors[4], 400, duplicates=DUPLICATE)
        assert [hit.row.path for hit in plain[:3]] == ["/004", "/copy-of-4", "/404"]
        assert hidden[0].row.path == "/004" and len(hidden) == 5
        assert not {"/copy-of-4", "/404"} & {hit.row.path for hit in hidden}
        rows = now.vectors.matrix[[hit.row.slot for hit in every]].astype(np.float32)
        cosines = rows @ rows.T - 2 * np.eye(len(rows))
        assert cosines.max() < DUPLICATE
        # what is missing has a better one that it looks like
        missing = set(now.live.tolist()) - {hit.row.slot for hit in every}
        assert len(missing) == 33  # pairs of which neither was dropped
        for slot in missing:
            assert (rows @ now.vectors.matrix[slot].astype(np.float32)).max() >= DUPLICATE


def test_weights(store: Writer, vectors: np.ndarray) -> None:
    def embed(item: Any) -> np.ndarray:
        return vectors[int(item)]

    with store.reading() as now:
        terms = embed_terms([Term("1"), Term("2", weight=0.5), Term("5", weight=-0.25)], embed)
        row = find(now, vectors[7], 1)[0].row
        found = combine([*terms, Term(row=row.id, weight=3.0)], now)
        halves = vectors[7].astype(np.float16).astype(np.float32)
        expected = vectors[1] + 0.5 * vectors[2] - 0.25 * vectors[5] + 3 * halves
        np.testing.assert_allclose(found, expected / np.linalg.norm(expected), atol=1e-6)
        with pytest.raises(QueryError, match="the terms take each other away"):
            combine(embed_terms([Term("1"), Term("1", weight=-1.0)], embed), now)
        with pytest.raises(QueryError, match="no more in the index"):
            combine([Term(row=10**6)], now)
        with pytest.raises(ValueError, match="the model gives 3 dimensions, the index has 24"):
            combine([Term(vector=np.ones(3, np.float32))], now)


def test_an_empty_index(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    writer = Writer(tmp_path / "index")
    update(writer, [tmp_path / "empty"], embed_all)
    with writer.reading() as now:
        assert find(now, embed_one("x"), 5) == []


# --- the commands --------------------------------------------------------------------------------


def run(*words: object) -> int:
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    assert isinstance(end.value.code, int)
    return end.value.code


@pytest.fixture(scope="module")
def model(llava: "Callable[[str], Case]") -> Path:
    """A random LLaVA-NeXT of three layers."""
    return llava("llama-gqa").folder


@pytest.fixture(scope="module")
def indexed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder ``files`` and its index beside it."""
    place = tmp_path_factory.mktemp("indexed")
    exif = Image.Exif()
    exif[0x0112] = 6
    draw(place / "files" / "up.jpg", 0)
    draw(place / "files" / "turned.jpg", 1, exif=exif)
    (place / "files" / "lines.txt").write_text("A dog sleeps.\nSnow falls.\n")
    options = ("--model", model, "--dtype", "float32")
    assert run("index", place / "files", "--index", place / "index", *options) == 0
    return place


def test_vectors_are_those_of_encode(indexed: Path, model: Path) -> None:
    """Photographs as they are seen."""
    e5v = E5V.from_pretrained(model, dtype="float32")
    turned = Image.open(indexed / "files" / "turned.jpg").transpose(Image.Transpose.ROTATE_270)
    inputs = [turned, indexed / "files" / "up.jpg", "A dog sleeps.", "Snow falls."]
    expected = e5v.encode_document(inputs).astype(np.float16)
    found = {
        text or Path(str(path)).name: np.frombuffer(vector, np.float16)
        for path, _, _, text, vector, _ in content_of(indexed / "index")
    }
    names = ["turned.jpg", "up.jpg", *inputs[2:]]
    np.testing.assert_allclose([found[name] for name in names], expected, atol=1e-3)


@pytest.mark.slow
def test_long_texts_are_cut(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "long.txt").write_text("long " * 3000)
    options = ("--model", model, "--dtype", "float32")
    assert run("index", tmp_path / "long.txt", "--index", tmp_path / "index", *options) == 0
    assert "1 text cut to fit the model" in capsys.readouterr().out
    ((*_, vector, _),) = content_of(tmp_path / "index")
    e5v = E5V.from_pretrained(model, dtype="float32")
    expected = e5v.encode_document("long " * 3000, truncate="end")
    np.testing.assert_allclose(np.frombuffer(vector, np.float16), expected, atol=1e-3)


def test_query_by_words(
    indexed: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("query", "Snow falls.", "--index", indexed / "index", "-t", 2, "--json") == 0
    hits = json.loads(capsys.readouterr().out)
    assert len(hits) == 2 and hits[0]["score"] >= hits[1]["score"]
    assert set(hits[0]) == {"score", "kind", "path", "line", "text"}
    assert run("query", "Snow falls.", "--index", indexed / "index") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and f"{indexed}/files/lines.txt:2  Snow falls." in "\n".join(lines)
    monkeypatch.chdir(indexed)
    assert run("query", "Snow falls.", "--index", "index") == 0
    assert "  files/lines.txt:2  Snow falls." in capsys.readouterr().out
    assert max(map(len, lines)) < 200


def test_query_by_a_photograph(indexed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It finds itself, turned as it was when it was indexed."""
    for name in ("up.jpg", "turned.jpg"):
        photograph = indexed / "files" / name
        words = ("query", photograph, "--index", indexed / "index", "-t", 1, "--json")
        assert run(*words) == 0
        (hit,) = json.loads(capsys.readouterr().out)
        assert hit["path"] == str(photograph) and hit["score"] > 0.999
        words = (*words, "--hide-duplicates")
        assert run(*words[:2], "but at night", "+", "snow", "-0.2", "a dog", *words[2:]) == 0
        assert len(json.loads(capsys.readouterr().out)) == 1


def test_an_index_names_its_model(
    indexed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is brought up to date without the flags of a model; a folder of its own stays as it is."""
    place = tmp_path / "copy"
    shutil.copytree(indexed, place)
    assert run("index", "--index", place / "index") == 0
    assert "(3 unchanged); 0 embedded" in capsys.readouterr().out
    (place / "files" / "new.txt").write_text("New.\n")
    assert run("index", place / "files" / "new.txt", "--index", place / "index") == 0
    told = capsys.readouterr().out
    assert told.startswith(f"{place}/index: 2 photographs and 3 texts of 4 files (1 new); 1 embed")


def test_another_prompt_embeds_all_again(
    indexed: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And until then, a query says what is wrong. So does one with another model's adapter."""
    shutil.copytree(indexed, tmp_path / "copy")
    index = tmp_path / "copy" / "index"
    other = ("--model", model, "--dtype", "float32", "--template", "vicuna")
    assert run("query", "x", "--index", index, *other) == 1
    assert "made with another template; bring it up to date" in capsys.readouterr().err
    assert run("index", "--index", index, *other) == 0
    told = capsys.readouterr().out
    assert "embeds all again: made with another template" in told
    assert "3 new); 4 embedded" in told
    before, after = (
        {row[0]: row[4] for row in content_of(folder)} for folder in (indexed / "index", index)
    )
    assert before.keys() == after.keys()
    assert all(before[path] != after[path] for path in before)
    assert run("query", "x", "--index", index, "-t", 1) == 0


def test_usage(indexed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = indexed / "index"
    for code, message, *words in (
        (2, "usage: ", "find"),
        (2, "--model: needed for a new index", "index", tmp_path, "--index", tmp_path / "new"),
        (2, "nothing to search for", "query", "--index", index),
        (2, "--dtype needs --model", "query", "x", "--index", index, "--dtype", "float16"),
        (2, "--top: 0, expected at least 1", "query", "x", "--index", index, "-t", "0"),
        (2, "--port: 70000", "serve", "--index", index, "--port", "70000"),
        (1, "no index there; make one", "query", "x", "--index", tmp_path / "none"),
        (1, "no such file or folder", "index", tmp_path / "gone", "--index", index),
    ):
        assert run(*words) == code
        assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    with hold(index):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-m", "e5v_jax.search", "index", "--index", str(index)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
        assert f"{index}: in use by process {os.getpid()}" in done.stderr
        with Store(index).reading() as now:  # who searches does not wait
            assert now.live.size == 4


def test_forgetting(indexed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(indexed, tmp_path / "copy")
    index = tmp_path / "copy" / "index"
    assert run("index", "--index", index, "--forget", indexed / "files" / "up.jpg") == 0
    assert "1 file dropped" in capsys.readouterr().out
