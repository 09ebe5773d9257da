"""An index whose vectors are in LanceDB does what one with files does."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from search_fakes import DIMENSIONS, content_of, draw, embed_all, embed_one

pytest.importorskip("lancedb", reason="pip install -e '.[lancedb]'")

from e5v_jax.search.index import update
from e5v_jax.search.query import DUPLICATE, find
from e5v_jax.search.store import IndexFolderError, Store
from e5v_jax.search.writer import Writer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """12 photographs and 200 texts."""
    for number in range(12):
        draw(tmp_path / "files" / f"{number}.jpg", number)
    for number in range(10):
        lines = [f"Line {line} of {number}.\n" for line in range(20)]
        (tmp_path / "files" / f"{number}.txt").write_text("".join(lines))
    return tmp_path / "files"


def run(index: Path, folder: Path, store: str | None = "lancedb") -> None:
    writer = Writer(index, store)
    try:
        update(writer, [folder], embed_all)
    finally:
        writer.close()


def hits(index: Path, duplicates: float | None = None) -> list[tuple[str, int | None, float]]:
    with Store(index).reading() as now:
        found = find(now, embed_one("a query"), 15, duplicates=duplicates)
    return [(hit.row.path, hit.row.line, hit.score) for hit in found]


def same_as_files(index: Path, folder: Path, fresh: Path) -> None:
    """Contents, vectors and results are those of a fresh index with files."""
    run(fresh, folder, None)
    assert content_of(index) == content_of(fresh)
    for duplicates in (None, DUPLICATE):
        assert hits(index, duplicates) == hits(fresh, duplicates)


def test_it_finds_what_files_find(folder: Path, tmp_path: Path) -> None:
    """After edits and deletions too; the old version is there for who reads it meanwhile."""
    index = tmp_path / "index"
    run(index, folder)
    same_as_files(index, folder, tmp_path / "first")
    assert not list(index.glob("*.f16"))
    before = content_of(index)
    for name in ("3.txt", "4.jpg"):
        (folder / name).unlink()
    (folder / "5.txt").write_text("Something else.\n")
    reader = Store(index)
    with reader.reading() as now:
        run(index, folder, None)
        assert sum(len(rows) for rows, _ in now.blocks(50)) == len(before)
    same_as_files(index, folder, tmp_path / "second")
    with reader.reading() as now:
        assert len(now.live) == 12 - 1 + 200 - 40 + 1
    meta = reader.read_meta()
    run(index, folder, None)  # nothing to do leaves the table as it is
    assert reader.read_meta()["version"] == meta["version"]


def test_what_was_not_committed_is_taken_back(folder: Path, tmp_path: Path) -> None:
    index = tmp_path / "index"
    run(index, folder)
    writer = Writer(index)
    with pytest.raises(ZeroDivisionError), writer.commit():
        writer.add_vectors(["lost"], np.ones((1, DIMENSIONS), np.float32))
        raise ZeroDivisionError
    assert "lost" not in str(hits(index))
    (folder / "new.txt").write_text("New.\n")
    update(writer, [folder], embed_all)
    same_as_files(index, folder, tmp_path / "fresh")


def test_made_anew(folder: Path, tmp_path: Path) -> None:
    index = tmp_path / "index"
    run(index, folder)
    writer = Writer(index)
    with writer.commit():
        writer.begin_anew(identity={})
    with writer.reading() as now:
        assert find(now, embed_one("x"), 5) == []
    update(writer, [folder], embed_all)
    same_as_files(index, folder, tmp_path / "fresh")
    (table,) = (index / "vectors.lance").iterdir()
    assert table.name == f"vectors_{writer.read_meta()['id']}_1.lance"


def test_two_indexes_at_one_address(folder: Path, tmp_path: Path) -> None:
    """Neither takes the other's table away."""
    address = f"file://{tmp_path}/shared"
    for index in (tmp_path / "one", tmp_path / "two"):
        run(index, folder, address)
    writer = Writer(tmp_path / "two")
    with writer.commit():
        writer.begin_anew(identity={})
    update(writer, [folder], embed_all)
    same_as_files(tmp_path / "one", folder, tmp_path / "fresh")
    assert len(list((tmp_path / "shared").iterdir())) == 2


def test_refusals(folder: Path, tmp_path: Path) -> None:
    index = tmp_path / "index"
    run(index, folder)
    with pytest.raises(IndexFolderError, match="keeps its vectors in lancedb, not in files"):
        Writer(index, "files")
    shutil.rmtree(index / "vectors.lance")
    with pytest.raises(IndexFolderError, match=r"vectors_\w+_0.*missing; delete"):
        hits(index)


CHILD = """
import sys
from pathlib import Path
import search_fakes
from e5v_jax.search import index
from e5v_jax.search.writer import Writer

index._TEXTS, index._IMAGES = 8, 2
writer = Writer(Path(sys.argv[1]), "lancedb")
print("started", flush=True)
index.update(writer, [Path(sys.argv[2])], search_fakes.embed_all)
"""


def test_kills(folder: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", CHILD, str(tmp_path / "index"), str(folder)]
    random, sizes = np.random.default_rng(0), [0]
    for _ in range(3):
        child = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)
        assert child.stdout is not None and child.stdout.readline() == b"started\n"
        time.sleep(random.uniform(0.02, 0.15))
        assert child.poll() is None, "it was through before the kill: give it more to do"
        child.send_signal(signal.SIGKILL)
        child.communicate()
        sizes.append(len(content_of(tmp_path / "index")))
    assert sizes == sorted(sizes) and 0 < sizes[-1] < 212
    subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)
    same_as_files(tmp_path / "index", folder, tmp_path / "fresh")


def test_the_flag(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from e5v_jax.search.__main__ import main

    with pytest.raises(SystemExit) as end:
        main(["index", str(folder), "--index", str(tmp_path / "i"), "--model", "m", "--store", "x"])
    assert end.value.code == 2
    assert "--store: 'x', expected files, lancedb or an address" in capsys.readouterr().err


def test_an_approximate_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made when there are many rows: it finds nearly all that comparing every row finds."""
    from e5v_jax.search import lance

    monkeypatch.setattr(lance, "_INDEXED", 2000)
    (tmp_path / "files").mkdir()
    for name in ("a", "b"):
        lines = "".join(f"{name} {number}\n" for number in range(1500))
        (tmp_path / "files" / f"{name}.txt").write_text(lines)
    run(tmp_path / "index", tmp_path / "files")
    run(tmp_path / "fresh", tmp_path / "files", None)
    table = json.dumps([path.name for path in (tmp_path / "index/vectors.lance").rglob("_indices")])
    assert "_indices" in table
    exact, found = hits(tmp_path / "fresh"), hits(tmp_path / "index")
    assert len(set(exact) & set(found)) >= 12
    assert found == sorted(found, key=lambda hit: -hit[2])
