"""An index that follows the files: edits, renames, deletions, damage, and kills meanwhile."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from search_fakes import content_of, draw, embed_all, embed_one

from e5v_jax.data.inputs import Input
from e5v_jax.search import index as index_module
from e5v_jax.search.index import OnError, Report, forget, update
from e5v_jax.search.photographs import make_thumbnail, upright
from e5v_jax.search.scan import find_files
from e5v_jax.search.store import Store
from e5v_jax.search.writer import Writer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three photographs, of which two are equal, and texts in three formats."""
    folder = tmp_path / "files"
    for name, seed in (("a.jpg", 0), ("deep/b.png", 1), ("deep/copy.png", 1)):
        draw(folder / name, seed)
    (folder / "lines.txt").write_text("A dog sleeps.\n\nSnow falls.\n")
    (folder / "notes.md").write_text("# Title\n\nTwo lines\nof one paragraph.\n\n\nThe last.\n")
    (folder / "rows.jsonl").write_text('{"text": "Row one.", "id": 1}\n{"text": "Snow falls."}\n')
    (folder / ".hidden.txt").write_text("hidden\n")
    (folder / "program.py").write_text("no text to index\n")
    return folder


def run(index: Path, *roots: Path, embed: Callable[..., np.ndarray] = embed_all) -> Report:
    writer = Writer(index)
    try:
        return update(writer, roots, embed)
    finally:
        writer.close()


def texts_of(index: Path) -> list[tuple[str, object, object]]:
    return [(Path(str(path)).name, line, text) for path, line, _, text, *_ in content_of(index)]


def no_model(inputs: Sequence[Input], on_error: OnError) -> np.ndarray:
    raise AssertionError(f"embedded again: {inputs}")


def count_calls(seen: list[Input]) -> Callable[..., np.ndarray]:
    def embed(inputs: Sequence[Input], on_error: OnError) -> np.ndarray:
        seen.extend(inputs)
        return embed_all(inputs, on_error)

    return embed


def edit(path: Path, text: str) -> None:
    path.write_text(text)
    later = path.stat().st_mtime_ns + 10**9
    os.utime(path, ns=(later, later))  # no clock is too coarse


def test_what_is_in_a_folder(folder: Path, tmp_path: Path) -> None:
    report = run(tmp_path / "index", folder)
    assert (report.new, report.embedded, report.failed) == (6, 7, {})  # of 9 rows, 2 are equal
    assert texts_of(tmp_path / "index") == [
        ("a.jpg", 0, ""),
        ("b.png", 0, ""),
        ("copy.png", 0, ""),
        ("lines.txt", 1, "A dog sleeps."),
        ("lines.txt", 3, "Snow falls."),
        ("notes.md", 1, "# Title\nTwo lines\nof one paragraph."),
        ("notes.md", 7, "The last."),
        ("rows.jsonl", 1, "Row one."),
        ("rows.jsonl", 2, "Snow falls."),
    ]
    for path, _, kind, text, vector, small in content_of(tmp_path / "index"):
        item = Path(str(path)) if kind == "image" else str(text)
        assert vector == embed_one(item).astype(np.float16).tobytes()
        assert bool(small) == (kind == "image")


def test_nothing_changed_needs_no_model(folder: Path, tmp_path: Path) -> None:
    run(tmp_path / "index", folder)
    before = content_of(tmp_path / "index")
    report = run(tmp_path / "index", embed=no_model)  # what was indexed before
    assert (report.unchanged, report.new, report.embedded) == (6, 0, 0)
    assert content_of(tmp_path / "index") == before


def test_an_edit_costs_what_is_new(folder: Path, tmp_path: Path) -> None:
    run(tmp_path / "index", folder)
    seen: list[Input] = []
    edit(folder / "notes.md", "# Title\n\nA new one.\n\nThe last.\n")
    draw(folder / "a.jpg", 9, (40, 60))
    report = run(tmp_path / "index", folder, embed=count_calls(seen))
    assert (report.edited, report.unchanged, report.embedded) == (2, 4, 2)
    assert seen == [folder / "a.jpg", "# Title\nA new one."]
    run(tmp_path / "fresh", folder)
    assert content_of(tmp_path / "index") == content_of(tmp_path / "fresh")


def test_renames_and_copies_cost_nothing(folder: Path, tmp_path: Path) -> None:
    run(tmp_path / "index", folder)
    store = Store(tmp_path / "index")
    with store.reading() as now:
        (before,) = [
            r for rows in now.rows_of(range(9)).values() for r in rows if "a.jpg" in r.path
        ]
    (folder / "a.jpg").rename(folder / "deep" / "renamed.jpeg")
    (folder / "lines.txt").rename(folder / "other.txt")
    shutil.copy(folder / "rows.jsonl", folder / "rows-2.jsonl")
    report = run(tmp_path / "index", folder, embed=no_model)
    assert (report.renamed, report.new, report.deleted) == (2, 1, 0)
    with store.reading() as now:
        after = now.row(before.id)
    assert after is not None and after.path == str(folder / "deep" / "renamed.jpeg")  # the same row
    run(tmp_path / "fresh", folder)
    assert content_of(tmp_path / "index") == content_of(tmp_path / "fresh")


def test_a_text_read_in_another_way_is_another(folder: Path, tmp_path: Path) -> None:
    """A renamed .txt is .md now: its lines are paragraphs."""
    run(tmp_path / "index", folder)
    (folder / "lines.txt").write_text("One\ntwo\n")
    run(tmp_path / "index", folder)
    (folder / "lines.txt").rename(folder / "lines.md")
    report = run(tmp_path / "index", folder)
    assert (report.renamed, report.new, report.deleted) == (0, 1, 1)
    assert ("lines.md", 1, "One\ntwo") in texts_of(tmp_path / "index")


def test_deletions(folder: Path, tmp_path: Path) -> None:
    run(tmp_path / "index", folder)
    shutil.rmtree(folder / "deep")
    edit(folder / "lines.txt", "")
    report = run(tmp_path / "index", folder, embed=no_model)
    assert (report.deleted, report.edited) == (2, 1)
    run(tmp_path / "fresh", folder)
    assert content_of(tmp_path / "index") == content_of(tmp_path / "fresh")
    store = Store(tmp_path / "index")
    with store.reading() as now:
        assert now.live.size == 5  # "Snow falls." is still in rows.jsonl


def test_what_is_not_given_stays(folder: Path, tmp_path: Path) -> None:
    """One folder is brought up to date, another is left; a folder that is gone is no deletion."""
    index, other = tmp_path / "index", tmp_path / "other"
    draw(other / "c.jpg", 5)
    run(index, folder, other)
    (folder / "a.jpg").unlink()
    (other / "c.jpg").unlink()
    assert run(index, folder).deleted == 1
    assert "c.jpg" in [name for name, *_ in texts_of(index)]
    assert run(index, folder / "lines.txt").unchanged == 1
    shutil.rmtree(other)
    with pytest.raises(FileNotFoundError, match=f"{other}: no such file or folder"):
        run(index)
    writer = Writer(index)
    assert forget(writer, [other]) == 1
    assert writer.read_meta()["roots"] == [str(folder)]
    with pytest.raises(ValueError, match="--forget /nowhere: nothing of it is in"):
        forget(writer, [Path("/nowhere")])
    assert run(index).unchanged == 5


def test_damaged_files_are_told_and_the_rest_is_indexed(folder: Path, tmp_path: Path) -> None:
    index = tmp_path / "index"
    (folder / "a.jpg").write_bytes((folder / "a.jpg").read_bytes()[:300])
    (folder / "none.png").write_bytes(b"no picture")
    (folder / "latin.txt").write_bytes(b"caf\xe9\n")
    (folder / "latin.md").write_bytes(b"caf\xe9\n")
    (folder / "rows.jsonl").write_text('{"text": "Good."}\n{"text": 5}\n{broken\n{"other": "x"}\n')
    (folder / "lines.txt").write_text("Fine.\nThis is unembeddable.\n")
    for _ in range(2):  # told again by an update that has nothing to do
        report = run(index, folder)
        failed = {Path(path).name: reason for path, reason in report.failed.items()}
        assert failed.pop("a.jpg").startswith("cannot be read as an image: ")
        assert failed.pop("none.png").startswith("not an image in a format that is read")
        assert failed == {
            "latin.txt": "1: not UTF-8 (byte 0xe9): save the file as UTF-8",
            "latin.md": "not UTF-8 (byte 3): save it as UTF-8",
            "rows.jsonl": "line 2: text is of type int, expected a string under the key text (and "
            "2 more lines)",
            "lines.txt": "line 2: the model gives no vector",
        }
    assert [text for _, _, text in texts_of(index) if text] == [
        "Fine.", "# Title\nTwo lines\nof one paragraph.", "The last.", "Good.",
    ]  # fmt: skip
    draw(folder / "a.jpg", 3)
    assert "a.jpg" not in {Path(path).name for path in run(index, folder).failed}


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("model")])
def test_what_is_wrong_with_no_file_ends_it(
    folder: Path, tmp_path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk or a broken model is an error; what was written before it stays."""
    monkeypatch.setattr(index_module, "_TEXTS", 2)
    seen: list[Input] = []

    def embed(inputs: Sequence[Input], on_error: OnError) -> np.ndarray:
        if seen:
            raise error
        return count_calls(seen)(inputs, on_error)

    with pytest.raises(type(error), match=str(error.args[-1])):
        run(tmp_path / "index", folder, embed=embed)
    assert [name for name, *_ in texts_of(tmp_path / "index")] == ["a.jpg", "b.png"]
    report = run(tmp_path / "index", folder)
    assert (report.embedded, report.failed) == (7 - len(seen), {})


def test_names_that_are_not_unicode_and_folders_that_cannot_be_read(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "index", folder)
    with open(os.fsencode(folder) + b"/caf\xe9.txt", "w") as file:
        file.write("text")
    real = os.scandir

    def scandir(path: str) -> object:
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)  # the tests may run as root
    report = run(tmp_path / "index", folder)
    assert report.failed == {
        f"{folder}/deep": "Permission denied",
        f"{folder}/caf\\udce9.txt": "its name is not UTF-8: rename it",
    }
    assert report.deleted == 0
    assert "b.png" in [name for name, *_ in texts_of(tmp_path / "index")]


def test_headings_belong_to_what_is_below(tmp_path: Path) -> None:
    """Alone they are no text to look for, but at the end of a file."""
    text = "One.\n# A\n\n## B\n\nTwo.\n\n```\n# a comment\n```\n\n# End\n"
    (tmp_path / "a.md").write_text(text)
    run(tmp_path / "index", tmp_path / "a.md")
    assert [(line, text) for _, line, text in texts_of(tmp_path / "index")] == [
        (1, "One.\n# A"),
        (4, "## B\nTwo."),
        (8, "```\n# a comment\n```"),
        (12, "# End"),
    ]


def test_other_files_are_refused_by_name(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"program\.py: unknown suffix '\.py', expected \.txt"):
        run(tmp_path / "index", folder / "program.py")


def test_the_index_may_lie_in_the_folder(folder: Path) -> None:
    run(folder / "index", folder)
    (folder / "index" / "lost.txt").write_text("not of the user's\n")
    assert find_files([folder], folder / "index")[0] == [
        str(folder / name)
        for name in (
            "a.jpg", "deep/b.png", "deep/copy.png", "lines.txt", "notes.md", "rows.jsonl"
        )
    ]  # fmt: skip


def test_a_file_that_changes_while_it_is_read(folder: Path, tmp_path: Path) -> None:
    """It is left for the next time, and its pixels do not become another file's vector."""

    def embed(inputs: Sequence[Input], on_error: OnError) -> np.ndarray:
        first = (folder / "a.jpg").read_bytes()
        draw(folder / "a.jpg", 77, (50, 50))
        (tmp_path / "first.jpg").write_bytes(first)
        return embed_all(inputs, on_error)

    report = run(tmp_path / "index", folder, embed=embed)
    assert report.failed == {str(folder / "a.jpg"): "it changed while it was read; index it again"}
    assert "a.jpg" not in [name for name, *_ in texts_of(tmp_path / "index")]
    shutil.copy(tmp_path / "first.jpg", folder / "first.jpg")
    run(tmp_path / "index", folder)
    run(tmp_path / "fresh", folder)
    assert content_of(tmp_path / "index") == content_of(tmp_path / "fresh")


# --- photographs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path: Path, suffix: str, orientation: int) -> None:
    """What is embedded and shown is what a viewer shows, for all eight orientations."""
    upright_pixels = np.zeros((48, 80, 3), np.uint8)
    upright_pixels[:24, :40] = (255, 0, 0)
    upright_pixels[24:, 40:] = (0, 0, 255)
    right = Image.fromarray(upright_pixels)
    back = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = right.transpose(back[orientation]) if orientation > 1 else right
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = tmp_path / f"photo.{suffix}"
    options = {"quality": 95} if suffix in ("jpg", "webp") else {}
    stored.save(file, exif=exif, **options)
    for source in (file, file.read_bytes()):
        found = upright(source)
        if orientation == 1:
            assert found is source
        else:
            assert isinstance(found, Image.Image)
            assert np.abs(np.asarray(found.convert("RGB"), int) - upright_pixels).mean() < 6
        small = make_thumbnail(source)
        assert (small.width, small.height) == (80, 48)


def test_thumbnails_of_every_mode(tmp_path: Path) -> None:
    """And of a large one, which becomes small without being enlarged ever."""
    large = make_thumbnail(draw(tmp_path / "large.jpg", 0, (1700, 900)))
    assert (large.width, large.height) == (400, 212)
    assert large.jpeg[:2] == b"\xff\xd8"
    for mode in ("1", "L", "LA", "P", "RGBA", "I;16"):
        Image.new(mode, (30, 20)).save(tmp_path / "mode.png")
        small = make_thumbnail(tmp_path / "mode.png")
        assert (small.width, small.height) == (30, 20)
    Image.new("CMYK", (30, 20)).save(tmp_path / "cmyk.jpg")
    assert make_thumbnail(tmp_path / "cmyk.jpg").width == 30


# --- kills ---------------------------------------------------------------------------------------

CHILD = """
import sys, time
from pathlib import Path
import search_fakes
from e5v_jax.search import index
from e5v_jax.search.writer import Writer

index._TEXTS, index._IMAGES = 8, 2
def slowly(inputs, on_error):
    print("block", flush=True)
    time.sleep(0.003)
    return search_fakes.embed_all(inputs, on_error)
writer = Writer(Path(sys.argv[1]))
print("started", flush=True)
index.update(writer, [Path(word) for word in sys.argv[2:]], slowly)
"""


def kill_while_indexing(folder: Path, tmp_path: Path, kills: int) -> None:
    """Kill it at a random moment ``kills`` times; each time the index can be read, and grows."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    random, sizes = np.random.default_rng(0), [0]
    index = tmp_path / "index"
    for number in range(kills):
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(index), str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
        )
        assert child.stdout is not None and child.stdout.readline() == b"started\n"
        if number % 2:  # between two blocks or in one, of which there are about 60
            for _ in range(random.integers(1, 4)):
                child.stdout.readline()
        time.sleep(random.uniform(0, 0.01))
        assert child.poll() is None, "it was through before the kill: give it more to do"
        child.send_signal(signal.SIGKILL)
        child.communicate()
        sizes.append(len(content_of(index)))
    assert sizes == sorted(sizes) and sizes[-1] > 0
    command = [sys.executable, "-c", CHILD, str(index), str(folder)]
    subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)
    run(tmp_path / "whole", folder)
    assert content_of(index) == content_of(tmp_path / "whole")


@pytest.fixture
def many(tmp_path: Path) -> Path:
    folder = tmp_path / "many"
    for number in range(40):
        draw(folder / f"{number}.jpg", number % 30)
    for number in range(20):
        lines = [f"Line {line} of {number % 15}.\n" for line in range(20)]
        (folder / f"{number}.txt").write_text("".join(lines))
    return folder


def test_three_kills(many: Path, tmp_path: Path) -> None:
    kill_while_indexing(many, tmp_path, 3)


@pytest.mark.slow
def test_twenty_kills(many: Path, tmp_path: Path) -> None:
    kill_while_indexing(many, tmp_path, 20)


def test_a_file_that_is_named_is_no_folder(tmp_path: Path) -> None:
    """Nothing is told of it: it is not walked through, too."""
    (tmp_path / "lines.txt").write_text("A dog sleeps.\n")
    found, failed = find_files([tmp_path / "lines.txt"], tmp_path / "index")
    assert found == [str(tmp_path / "lines.txt")] and not failed
