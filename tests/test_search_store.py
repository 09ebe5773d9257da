"""The index on disk: exact scores, nothing seen before its commit, nothing lost by a rewriting."""

import json
import sqlite3
from pathlib import Path

import numpy as np
import pytest
from search_fakes import DIMENSIONS

from e5v_jax.search import store as store_module
from e5v_jax.search.matrix import append_vectors, map_vectors, score
from e5v_jax.search.scan import File, Part
from e5v_jax.search.store import IndexFolderError, Store
from e5v_jax.search.writer import Writer


def unit(seed: int, rows: int, dimensions: int = DIMENSIONS) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((rows, dimensions)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def put(writer: Writer, name: str, vectors: np.ndarray) -> None:
    """A text file of as many lines as there are vectors."""
    parts = [Part(f"{name} {i}", "text", i + 1, f"{name} {i}") for i in range(len(vectors))]
    with writer.commit():
        writer.add_vectors([part.content for part in parts], vectors)
        writer.put_file(File(f"/{name}", 1, 2, name), parts, None)


@pytest.mark.parametrize("dimensions", [2, 24, 25, 576, 2048])
@pytest.mark.parametrize("rows", [1, 300, 5000])
def test_scores_are_exact(rows: int, dimensions: int) -> None:
    """As NumPy's own conversion has them in fp64, for every size of block and number of threads."""
    halves = unit(0, rows, dimensions).astype(np.float16)
    vector = unit(1, 1, dimensions)[0]
    expected = halves.astype(np.float64) @ vector.astype(np.float64)
    np.testing.assert_allclose(score(halves, vector), expected, rtol=0, atol=3e-7)


def test_every_fp16_number_is_converted() -> None:
    """All 63,488 finite ones, subnormal numbers and both zeros, in both halves of a word."""
    numbers = np.arange(2**16, dtype=np.uint16).view(np.float16)
    numbers = numbers[np.isfinite(numbers)]
    pairs = np.stack([numbers, numbers[::-1]], axis=1)
    for axis in (0, 1):
        one = np.eye(2, dtype=np.float32)[axis]
        np.testing.assert_array_equal(score(pairs, one), pairs[:, axis].astype(np.float32))


def test_an_empty_matrix() -> None:
    assert score(np.zeros((0, 8), np.float16), unit(0, 1, 8)[0]).shape == (0,)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    writer, vectors = Writer(tmp_path / "index"), unit(0, 7)
    put(writer, "a", vectors[:4])
    reader = Store(tmp_path / "index")
    with reader.reading() as now:
        assert now.live.tolist() == [0, 1, 2, 3]
        (row,) = now.rows_of([2])[2]
        assert (row.path, row.line, row.text, row.kind) == ("/a", 3, "a 2", "text")
        assert now.row(row.id) == row and now.row(999) is None
        np.testing.assert_array_equal(now.vectors.matrix, vectors[:4].astype(np.float16))
        put(writer, "b", vectors[4:])  # a commit meanwhile is not seen yet
        assert now.rows_of([5]) == {}
    with reader.reading() as now:
        assert now.live.tolist() == list(range(7))
        np.testing.assert_array_equal(now.vectors.matrix, vectors.astype(np.float16))
    assert reader.count() == {"images": 0, "texts": 7, "files": 2, "failed": 0}


def test_vectors_without_a_commit_are_not_seen(tmp_path: Path) -> None:
    """As a kill leaves them, whole or in part: the next commit writes over them."""
    writer, vectors = Writer(tmp_path / "index"), unit(0, 6)
    put(writer, "a", vectors[:2])
    file = tmp_path / "index" / "vectors-0.f16"
    append_vectors(file, 2, vectors[2:5].astype(np.float16))
    with file.open("ab") as end:
        end.write(b"half")
    with pytest.raises(ZeroDivisionError), writer.commit():  # and an error takes all of it back
        writer.add_vectors(["lost"], vectors[5:])
        raise ZeroDivisionError
    writer.close()
    writer = Writer(tmp_path / "index")
    with writer.reading() as now:
        assert now.vectors.matrix.shape == (2, DIMENSIONS)
    put(writer, "b", vectors[5:])
    with writer.reading() as now:
        np.testing.assert_array_equal(now.vectors.matrix, vectors[[0, 1, 5]].astype(np.float16))


def test_rewriting_keeps_what_is_used(tmp_path: Path) -> None:
    """And who reads meanwhile reads the old matrix to the end."""
    writer, vectors = Writer(tmp_path / "index"), unit(0, 12)
    for name, rows in (("a", slice(0, 4)), ("b", slice(4, 7)), ("c", slice(7, 12))):
        put(writer, name, vectors[rows])
    reader = Store(tmp_path / "index")
    known = writer.known_files()
    with reader.reading() as now:
        with writer.commit():
            writer.drop_files([known["/a"][0], known["/c"][0]])
        writer.tidy()
        assert now.rows_of([11])[11][0].text == "c 4"
        np.testing.assert_array_equal(now.vectors.matrix, vectors.astype(np.float16))
    with reader.reading() as now:
        assert now.live.tolist() == [0, 1, 2]
        texts = [found[0].text for found in now.rows_of([0, 1, 2]).values()]
        assert texts == ["b 0", "b 1", "b 2"]
        np.testing.assert_array_equal(now.vectors.matrix, vectors[4:7].astype(np.float16))
    assert [file.name for file in sorted((tmp_path / "index").glob("*.f16"))] == ["vectors-1.f16"]


def test_few_dropped_vectors_stay_in_place(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "index")
    put(writer, "a", unit(0, 2))
    put(writer, "b", unit(1, 5))
    with writer.commit():
        writer.drop_files([writer.known_files()["/a"][0]])
    writer.tidy()
    with writer.reading() as now:
        assert now.live.tolist() == [2, 3, 4, 5, 6] and len(now.vectors.matrix) == 7
    assert writer.slots_of(["a 0", "b 0"]) == {"b 0": 2}
    put(writer, "a", unit(0, 2))  # its slots are new ones
    assert writer.slots_of(["a 0"]) == {"a 0": 7}


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0, 1e6])
def test_no_vector_that_is_not_finite(tmp_path: Path, bad: float) -> None:
    writer, vectors = Writer(tmp_path / "index"), unit(0, 2)
    vectors[1] = bad
    with pytest.raises(ValueError, match="a 1: its vector is zero or not finite in fp16"):
        put(writer, "a", vectors)
    assert writer.count()["texts"] == 0


def test_refusals(tmp_path: Path) -> None:
    index = tmp_path / "index"
    with pytest.raises(IndexFolderError, match="no index there; make one"):
        Store(index)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    with pytest.raises(IndexFolderError, match="not empty and no index"):
        Writer(tmp_path / "full")
    writer = Writer(index)
    put(writer, "a", unit(0, 2))
    with pytest.raises(ValueError, match="vectors of 7 dimensions, the index has 24"):
        put(writer, "b", unit(0, 2, 7))
    writer.close()
    file = index / "vectors-0.f16"
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    with (
        pytest.raises(ValueError, match=r"95 bytes, expected 96 .* damaged"),
        Store(index).reading(),
    ):
        pass
    file.unlink()
    with pytest.raises(IndexFolderError, match=r"vectors-0.f16: missing"), Store(index).reading():
        pass
    file.write_bytes(content)
    with sqlite3.connect(index / "index.sqlite") as connection:
        connection.execute("UPDATE meta SET value = ? WHERE key = 'format'", [json.dumps(99)])
    with pytest.raises(IndexFolderError, match=f"format 99, expected {store_module.FORMAT}"):
        Store(index)
    (index / "index.sqlite").write_bytes(b"no database at all" * 100)
    with pytest.raises(IndexFolderError, match="not a database; delete the index"):
        Store(index)


def test_a_kill_while_an_index_is_made(tmp_path: Path) -> None:
    index = tmp_path / "index"
    index.mkdir()
    for name in (".index.sqlite.tmp", ".index.sqlite.tmp-journal"):
        (index / name).write_bytes(b"half")
    put(Writer(index), "a", unit(0, 2))
    assert Store(index).count()["texts"] == 2


def test_mapping_nothing(tmp_path: Path) -> None:
    assert map_vectors(tmp_path / "none", 0, 5).shape == (0, 5)
