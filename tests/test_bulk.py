"""The encode command into a folder: inputs of every kind, shards, resuming, rows that fail."""

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from faults import file_size_limit
from hf_models import EMBED, NORM, RECIPES, build_llava, changed, picture
from PIL import Image

from e5v_jax import E5V, lock
from e5v_jax.checkpoints import from_hf
from e5v_jax.encode.__main__ import main as encode
from e5v_jax.encode.bulk import read_embeddings
from e5v_jax.encode.encoder import Statistics
from e5v_jax.encode.files import iterate_items, scan_items
from e5v_jax.encode.ids import repeated_ids
from e5v_jax.encode.progress import BulkProgress

Command = Callable[..., tuple[int, str, str]]
TEXTS = [f"Text number {i}: {'very ' * (i % 7)}short." for i in range(23)]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    build_llava(RECIPES["llama-gqa"], folder / "hf")
    from_hf.convert(from_hf.Args(str(folder / "hf"), folder / "converted"))
    return folder / "converted"


@pytest.fixture(scope="module")
def model(model_folder: Path) -> E5V:
    return E5V.from_pretrained(model_folder, dtype="float32")


@pytest.fixture
def command(
    capsys: pytest.CaptureFixture[str],
    model: E5V,
    model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> Command:
    """Run the command in this process, with the model that is loaded and compiled."""
    monkeypatch.setattr(E5V, "from_pretrained", lambda *_, **__: model)
    monkeypatch.chdir(tmp_path)

    def run(*argv: str | Path) -> tuple[int, str, str]:
        words = ["--model", str(model_folder), "--output", "out", *map(str, argv)]
        with pytest.raises(SystemExit) as exit_:
            encode(words)
        assert isinstance(exit_.value.code, int)
        return exit_.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(TEXTS))
    return file


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# --- what is written -----------------------------------------------------------------------------


def test_shards(command: Command, model: E5V, texts: Path) -> None:
    code, out, _ = command("--input", texts, "--shard-size", "10")
    assert code == 0
    assert out.startswith("out: 23 of 23 rows embedded in 3 shards, ")
    assert "items/s" in out and "tokens/s" in out and "% padding" in out
    names = [f"shard-{i:05d}.{suffix}" for i in range(3) for suffix in ("parquet", "sha256")]
    assert sorted(contents(Path("out"))) == ["manifest.json", *names]
    subprocess.run("sha256sum --check --strict *.sha256", shell=True, cwd="out", check=True)
    table = pq.read_table(sorted(Path("out").glob("*.parquet")))
    assert table.schema.field("id").type == pa.string()
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), 64)
    assert table["id"].to_pylist() == [str(i) for i in range(1, 24)]
    ids, vectors = read_embeddings(Path("out"))
    assert ids == table["id"].to_pylist()
    np.testing.assert_allclose(vectors, model.encode(TEXTS), atol=1e-6)
    manifest = json.loads(Path("out/manifest.json").read_text())
    counts = {"embedded": 23, "failed": 0, "truncated": 0, "shards": 3}
    assert manifest["result"] == {"rows": 23, **counts}
    assert set(manifest["versions"]) >= {"jax", "e5v_jax"}
    assert len(manifest["model_sha256"]) == len(manifest["input_sha256"]) == 64


def test_npy_and_float16(command: Command, model: E5V, texts: Path) -> None:
    flags = ["--format", "npy", "--embedding-dtype", "float16", "--truncate-dim", "8"]
    assert command("--input", texts, "--shard-size", "20", *flags)[0] == 0
    first = np.load("out/shard-00000.npy")
    assert (first.dtype, first.shape) == (np.float16, (20, 8))
    assert json.loads(Path("out/shard-00001.ids.json").read_text()) == ["21", "22", "23"]
    ids, vectors = read_embeddings(Path("out"))
    assert ids == [str(i) for i in range(1, 24)]
    np.testing.assert_allclose(vectors, model.encode(TEXTS, truncate_dim=8), atol=1e-3)


def test_parquet_of_half_precision_is_read_back(command: Command, texts: Path) -> None:
    assert command("--input", texts, "--embedding-dtype", "float16")[0] == 0
    table = pq.read_table("out/shard-00000.parquet")
    assert table.schema.field("embedding").type == pa.list_(pa.float16(), 64)
    assert read_embeddings(Path("out"))[1].dtype == np.float16


def png(image: Image.Image) -> bytes:
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


def test_parquet_input(command: Command, model: E5V) -> None:
    """Images as bytes, as paths and as the struct of Hugging Face's datasets."""
    images = [picture(40, 30, seed=i) for i in range(3)]
    images[1].save("b.png")
    bytes_ = pa.array([png(images[0]), None], pa.binary())
    pq.write_table(pa.table({"id": [7, 8], "text": [None, "a dog"], "image": bytes_}), "a.parquet")
    structs = [{"bytes": None, "path": "b.png"}, {"bytes": png(images[2]), "path": None}]
    pq.write_table(pa.table({"image": structs}), "b.parquet")
    code, _, err = command("--input", "*.parquet")
    assert code == 0, err
    ids, vectors = read_embeddings(Path("out"))
    assert ids == ["7", "8", "b.parquet:1", "b.parquet:2"]
    expected = model.encode([images[0], "a dog", images[1], images[2]])
    np.testing.assert_allclose(vectors, expected, atol=1e-6)


def test_glob_of_images(command: Command, model: E5V) -> None:
    for name, seed in (("p/x/2.png", 2), ("p/1.png", 1)):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        picture(30, 40, seed=seed).save(name)
    assert command("--input", "p/**/*.png", "--shard-size", "1")[0] == 0
    ids, vectors = read_embeddings(Path("out"))
    assert ids == ["p/1.png", "p/x/2.png"]
    np.testing.assert_allclose(vectors, model.encode([Path(name) for name in ids]), atol=1e-6)


# --- rows that fail ------------------------------------------------------------------------------


def ugly_images(folder: Path) -> dict[str, str | None]:
    """Images as they are found, and why each cannot be embedded (None: it can)."""
    folder.mkdir()
    photo = picture(60, 90, seed=3)
    photo.save(folder / "plain.png")
    data = (folder / "plain.png").read_bytes()
    (folder / "corrupt.png").write_bytes(data[:60] + bytes(40) + data[100:])
    (folder / "truncated.png").write_bytes(data[: len(data) // 2])
    (folder / "text.png").write_text("not an image")
    (folder / "empty.png").write_bytes(b"")
    Image.new("1", (10_000, 10_000)).save(folder / "bomb.png")
    photo.convert("CMYK").save(folder / "cmyk.jpg")
    photo.quantize(16).save(folder / "palette.png")
    photo.quantize(16).save(folder / "animated.gif", save_all=True, append_images=[photo])
    deep = np.arange(60 * 90, dtype=np.uint16).reshape(60, 90) * 12
    Image.fromarray(deep).save(folder / "deep.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    photo.save(folder / "rotated.jpg", exif=exif)
    photo.convert("RGBA").save(folder / "alpha.png")
    Image.new("RGB", (1, 1), "red").save(folder / "pixel.png")
    return {
        "corrupt.png": "cannot be read as an image",
        "truncated.png": "cannot be read as an image",
        "text.png": "not an image in a format that is read",
        "empty.png": "not an image in a format that is read",
        "bomb.png": "10000x10000 pixels, more than the",
        "plain.png": None,
        "cmyk.jpg": None,
        "palette.png": None,
        "animated.gif": None,
        "deep.png": None,
        "rotated.jpg": None,
        "alpha.png": None,
        "pixel.png": None,
    }


def test_ugly_images(command: Command, model: E5V, tmp_path: Path) -> None:
    """Embedded as the reference would, ``Image.open(path).convert("RGB")``, or listed."""
    expected = ugly_images(tmp_path / "photos")
    code, out, err = command("--input", "photos", "--on-error", "skip", "--shard-size", "4")
    assert code == 0, err
    bad = sorted(name for name, reason in expected.items() if reason)
    assert out.endswith(f"{len(bad)} failed: see out/failed.jsonl\n")
    rows = [json.loads(line) for line in Path("out/failed.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == bad
    for row in rows:
        assert expected[row["id"]] in row["reason"] and row["where"] == "photos"
    ids, vectors = read_embeddings(Path("out"))
    assert ids == sorted(name for name, reason in expected.items() if reason is None)
    for name, vector in zip(ids, vectors, strict=True):
        opened = Image.open(tmp_path / "photos" / name).convert("RGB")
        np.testing.assert_allclose(vector, model.encode(opened), atol=1e-6, err_msg=name)


def test_bad_rows_are_listed_by_place(command: Command, tmp_path: Path) -> None:
    rows = ['{"text": "a"}', '{"text": 5}', "{", '{"text": "a <image>"}', '{"image": "no.png"}']
    rows += ['{"id": "1", "text": "b"}', '{"text": "c"}', '{"image": "http://x/y.png"}']
    rows += [r'{"id": "\ud800", "text": "d"}', r'{"text": "\ud800"}']
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    flags = ("--on-error", "skip", "--special-tokens", "refuse")
    code, _, err = command("--input", "a.jsonl", *flags)
    assert code == 0, err
    failed = [json.loads(line) for line in Path("out/failed.jsonl").read_text().splitlines()]
    assert [row["where"] for row in failed] == [f"a.jsonl:{i}" for i in (2, 3, 4, 5, 6, 8, 9, 10)]
    reasons = ["of type int", "broken json", "'<image>'", "no such file", "is taken", "not fetched"]
    reasons += ["id has half a character", "lone surrogate '\\ud800'"]
    for row, reason in zip(failed, reasons, strict=True):
        assert reason in row["reason"], row
    assert read_embeddings(Path("out"))[0] == ["1", "7"]


def test_raise_keeps_the_shards_before(command: Command, texts: Path) -> None:
    lines = [*TEXTS[:15], "my <image> of", *TEXTS[15:]]
    texts.write_text("\n".join(lines))
    code, _, err = command("--input", texts, "--shard-size", "10", "--special-tokens", "refuse")
    assert code == 1
    assert err.splitlines()[-1].startswith(f"error: {texts}:16: the text contains '<image>'")
    names = ["manifest.json", "shard-00000.parquet", "shard-00000.sha256"]
    assert sorted(contents(Path("out"))) == names


def test_vectors_that_say_nothing(command: Command, model: E5V, texts: Path) -> None:
    """They stop the run by file and row, or are listed; in the shards are none."""
    texts.write_text("\n".join([*TEXTS[:12], "Z", *TEXTS[12:]]))
    flags = ("--input", texts, "--shard-size", "10")
    token = model.tokenizer.convert_tokens_to_ids("Z")
    with changed(model, EMBED, lambda x: x.at[token].set(np.inf)):
        code, _, err = command(*flags)
        assert code == 1
        assert err.splitlines()[-1].startswith(f"error: {texts}:13: its vector is not finite: is ")
        shutil.rmtree("out")
        assert command(*flags, "--on-error", "skip")[0] == 0
    (row,) = map(json.loads, Path("out/failed.jsonl").read_text().splitlines())
    assert (row["id"], row["where"]) == ("13", f"{texts}:13") and "not finite" in row["reason"]
    ids, vectors = read_embeddings("out")
    assert ids == [str(i) for i in range(1, 25) if i != 13]
    np.testing.assert_allclose(vectors, model.encode(TEXTS), atol=1e-6)


def test_vectors_too_large_for_float16(command: Command, model: E5V, texts: Path) -> None:
    flags = ("--input", texts, "--embedding-dtype", "float16")
    with changed(model, NORM, lambda x: x.at[3].set(1e6)):
        code, _, err = command(*flags, "--no-normalize")
        assert code == 1 and err.splitlines()[-1] == (
            f"error: {texts}:1: its vector does not fit --embedding-dtype: use float32"
        )
        assert command(*flags)[0] == 0


def jsonl(file: Path, rows: list[dict[str, object]]) -> Path:
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def test_repeated_ids(command: Command, tmp_path: Path) -> None:
    """Only the first row of an id is embedded, whatever shards the others are in."""
    ids = ["a", "b", "a", "c", "ü", "b", "a", "ü", "d"]
    rows = [{"id": id, "text": text} for id, text in zip(ids, TEXTS, strict=False)]
    source = jsonl(tmp_path / "a.jsonl", rows)
    flags = ("--input", "a.jsonl", "--shard-size", "2", "--format", "npy")
    code, _, err = command(*flags)
    assert code == 1 and err.endswith("a.jsonl:3: id 'a' is taken: see a.jsonl:1\n")
    assert not Path("out").exists()
    assert command(*flags, "--on-error", "skip")[0] == 0
    whole = contents(Path("out"))
    assert read_embeddings(Path("out"))[0] == ["a", "b", "c", "ü", "d"]
    failed = [json.loads(line) for line in whole["failed.jsonl"].splitlines()]
    assert [(row["where"], row["reason"]) for row in failed] == [
        (f"a.jsonl:{row}", f"id {ids[row - 1]!r} is taken: see a.jsonl:{first}")
        for row, first in ((3, 1), (6, 2), (7, 1), (8, 5))
    ]
    Path("out/shard-00002.npy").unlink()
    Path("out/.repeated.tmp").write_text('[0, "what a kill left"]\n')
    assert command(*flags, "--on-error", "skip")[0] == 0
    assert contents(Path("out")) == whole
    source.write_text("{\n" + source.read_text())  # the first bad row is the one that is told
    assert "a.jsonl:1: broken json" in command(*flags)[2]


def test_rows_without_text_and_image_in_parquet(command: Command, tmp_path: Path) -> None:
    """The scan, which reads no images, does not find them; the run does."""
    table = pa.table({"text": ["a", None], "image": pa.array([None, None], pa.binary())})
    pq.write_table(table, tmp_path / "a.parquet")
    code, _, err = command("--input", "a.parquet")
    assert code == 1 and err.endswith("error: a.parquet:2: neither text nor image is given\n")
    assert not Path("out").exists()
    assert command("--input", "a.parquet", "--on-error", "skip")[0] == 0
    assert read_embeddings(Path("out"))[0] == ["1"]


# --- what is read --------------------------------------------------------------------------------


def destroy(file: Path, group: int, column: int) -> None:
    """Overwrite the values of a column in a row group of a Parquet file."""
    chunk = pq.read_metadata(file).row_group(group).column(column)
    data = bytearray(file.read_bytes())
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    data[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    file.write_bytes(data)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv", ".parquet"])
def test_rows_that_are_not_wanted_are_not_read(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"rows{suffix}"
    if suffix == ".txt":
        file.write_text("a\n\n\nb\n")
    elif suffix == ".jsonl":
        file.write_text('{"text": "a"}\n\n{\n{"image": "none.png"}\n{"text": "b"}\n')
    elif suffix == ".csv":
        file.write_text("text,image\na,\n,\n\n,none.png,\nb,\n")
    else:
        pq.write_table(pa.table({"text": list("axyb")}), file, row_group_size=1)
        destroy(file, 1, 0)
        destroy(file, 2, 0)
    items = list(iterate_items(file, iter([True, False, False, True])))
    assert [item and item.value for item in items] == [{"text": "a"}, None, None, {"text": "b"}]
    chosen = list(iterate_items(tmp_path / "*.*", iter([False, False, False, True])))
    assert [item and item.id for item in chosen[:3]] == [None] * 3
    assert chosen[3] is not None and items[3] is not None
    assert chosen[3].id == f"{file}:{items[3].id}"


def test_scan_reads_no_images(tmp_path: Path) -> None:
    """Of Parquet, only the footer tells it of images that are bytes; their paths it reads."""
    file = tmp_path / "a.parquet"

    def write(image: pa.Array) -> str:
        pq.write_table(pa.table({"image": image}), file, compression=None)
        fingerprint = scan_items(file, allow_errors=False).fingerprint
        destroy(file, 0, 0)
        assert scan_items(file, allow_errors=False).fingerprint == fingerprint
        with pytest.raises(ValueError, match=r"a\.parquet: broken parquet"):
            list(iterate_items(file))
        return fingerprint

    found = {write(pa.array([b"image", b"other"])), write(pa.array([b"image", b"another"]))}
    for path in ("a.png", "b.png"):
        found.add(
            write(pa.array([{"bytes": b"image", "path": path}, {"bytes": b"", "path": None}]))
        )
    assert len(found) == 4


@pytest.mark.slow
def test_memory_does_not_grow(tmp_path: Path) -> None:
    """A scan and a pass over a million rows take what those over a tenth take."""
    code = """
import resource, sys
from pathlib import Path
from e5v_jax.encode.files import iterate_items, scan_items
rows = scan_items(Path(sys.argv[1]), allow_errors=True).rows
assert rows == sum(1 for item in iterate_items(Path(sys.argv[1])))
print(rows, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    memory = {}
    for rows in (100_000, 1_000_000):
        file = tmp_path / f"{rows}.jsonl"
        with file.open("w") as lines:
            for i in range(rows):
                id = hashlib.sha256(str(i // 2 if i % 100 == 1 else i).encode()).hexdigest()
                lines.write(json.dumps({"id": id, "text": f"Text number {i}."}) + "\n")
        done = subprocess.run(
            [sys.executable, "-c", code, file], check=True, capture_output=True, text=True
        )
        found, memory[rows] = map(int, done.stdout.split())
        assert found == rows
    assert memory[1_000_000] - memory[100_000] < 40_000  # KiB


# --- resuming ------------------------------------------------------------------------------------


def test_resumes_where_it_was(command: Command, texts: Path, monkeypatch: Any) -> None:
    """A shard that is there is not made again; what is missing or half-written is."""
    flags = ("--input", texts, "--shard-size", "5")
    assert command(*flags)[0] == 0
    whole = contents(Path("out"))
    Path("out/shard-00003.parquet").unlink()
    Path("out/.shard-00003.parquet.1.tmp").write_bytes(b"half")
    counts = []
    original = E5V.encode
    monkeypatch.setattr(
        E5V,
        "encode",
        lambda self, items, **kw: counts.append(len(items)) or original(self, items, **kw),
    )
    assert command(*flags)[0] == 0
    assert counts == [5]
    assert contents(Path("out")) == whole


def test_a_run_that_cannot_begin_binds_none(command: Command, texts: Path) -> None:
    """Its first row is bad: corrected, the input is another, and is taken."""
    flags = ("--input", texts, "--shard-size", "10", "--special-tokens", "refuse")
    for before in ([], ["out"]):
        for folder in before:
            Path(folder).mkdir()
        texts.write_text("\n".join(["my <image> of", *TEXTS]))
        assert command(*flags)[0] == 1
        assert sorted(path.name for path in Path().iterdir()) == [*before, texts.name]
    assert not contents(Path("out"))
    texts.write_text("\n".join(TEXTS))
    assert command(*flags)[0] == 0
    whole = contents(Path("out"))
    # as if killed between the manifest and the first shard, with other flags
    for path in Path("out").glob("shard-*"):
        path.unlink()
    assert command(*flags, "--no-normalize")[0] == 0
    assert contents(Path("out")) != whole
    assert "begun with normalize_embeddings False" in command(*flags)[2]


def test_one_program_at_a_time(
    command: Command, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Into a folder and into a file; the second is told before it loads the model."""
    for output in ("out", "out.npy"):
        with lock.hold(Path(output)), monkeypatch.context() as patch:
            patch.delattr(E5V, "from_pretrained")
            code, _, err = command("--input", texts, "--output", output)
        assert code == 1 and f"{output}: in use by process {os.getpid()} on " in err
        assert sorted(path.name for path in Path().iterdir()) == [texts.name]


@pytest.mark.parametrize("format", ["parquet", "npy"])
def test_full_disk(command: Command, tmp_path: Path, format: str) -> None:
    """One line with file and remedy; what is done stays, and is gone on with."""
    rng = np.random.default_rng(0)
    rows = [{"text": text} for text in TEXTS[:9]]
    rows[5]["id"] = rng.bytes(10_000).hex()  # does not compress
    source = jsonl(tmp_path / "rows.jsonl", rows)
    flags = ("--input", source, "--shard-size", "3", "--format", format)
    assert command(*flags)[0] == 0
    whole = contents(Path("out"))
    shutil.rmtree("out")
    name = {"parquet": "shard-00001.parquet", "npy": "shard-00001.ids.json"}[format]
    for limit, failed in ((10, ".out.lock"), (800, "manifest.json"), (10_000, name)):
        with file_size_limit(limit):
            code, _, err = command(*flags)
        assert code == 1 and err.splitlines()[-1].endswith(
            f"/{failed}: File too large: free some space there, then start it again"
        )
        assert Path("out").exists() == (limit == 10_000)
    done = [name for name in whole if "00000" in name]
    assert {name: whole[name] for name in done} == {
        name: data for name, data in contents(Path("out")).items() if "00000" in name
    }
    assert not list(Path("out").glob(".*"))
    assert command(*flags)[0] == 0
    assert contents(Path("out")) == whole


def test_no_room_for_the_ids(tmp_path: Path) -> None:
    ids = ((f"{i:0200d}", "a") for i in range(60_000))
    with (
        file_size_limit(100_000),
        pytest.raises(OSError, match=r"temporary file of ids: .*; TMPDIR names its folder"),
    ):
        list(repeated_ids(ids))


@pytest.mark.parametrize(
    ("flags", "key"),
    [
        (["--shard-size", "6"], "shard_size"),
        (["--prompt-name", "sts"], "prompt_name"),
        (["--no-normalize"], "normalize_embeddings"),
        (["--embedding-dtype", "float16"], "embedding_dtype"),
        (["--dtype", "float32"], "dtype"),
    ],
)
def test_another_run_is_refused(command: Command, texts: Path, flags: list[str], key: str) -> None:
    assert command("--input", texts, "--shard-size", "5")[0] == 0
    whole = contents(Path("out"))
    words = ["--input", texts, *([] if key == "shard_size" else ["--shard-size", "5"]), *flags]
    code, _, err = command(*words)
    assert code == 1 and f"error: out: begun with {key} " in err
    assert contents(Path("out")) == whole


def test_changed_input_is_refused(command: Command, texts: Path) -> None:
    assert command("--input", texts)[0] == 0
    texts.write_text("\n".join([*TEXTS[:-1], "something else"]))
    code, _, err = command("--input", texts)
    assert code == 1 and "begun with input_sha256" in err


def test_an_older_format_is_refused(command: Command, texts: Path) -> None:
    assert command("--input", texts)[0] == 0
    manifest = json.loads(Path("out/manifest.json").read_text())
    Path("out/manifest.json").write_text(json.dumps({**manifest, "format_version": 1}))
    code, _, err = command("--input", texts)
    assert code == 1
    assert err.splitlines()[-1].startswith(
        "error: out: begun by another version of e5v_jax (format 1"
    )


def test_a_folder_of_something_else_is_refused(command: Command, texts: Path) -> None:
    Path("out").mkdir()
    Path("out/notes.txt").write_text("mine")
    code, _, err = command("--input", texts)
    assert code == 1 and "not empty and no output of this command" in err
    assert sorted(contents(Path("out"))) == ["notes.txt"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--text", "a"], "an output folder needs --input"),
        (["--input", "texts.txt", "--shard-size", "0"], "--shard-size: 0, expected at least 1"),
        (["--input", "texts.txt", "--shard-size", "9" * 30], "--shard-size: 999999999999999999999"),
        (["--input", "texts.txt", "--model", ""], "--model: empty, expected a folder, a file or"),
        (["--input", "texts.txt", "--output", "a.npy", "--on-error", "skip"], "--on-error needs"),
        (["--input", "texts.txt", "--tensor", "3"], "mesh data=-1 fsdp=1 tensor=3 does not fit"),
        (
            ["--input", "none.txt", "--attn-implementation", "cudnn"],
            "attn_implementation 'cudnn' is for a GPU, this runs on a CPU: choose auto or xla",
        ),
    ],
)
def test_wrong_usage(command: Command, texts: Path, words: list[str], message: str) -> None:
    code, _, err = command(*words)
    assert code == 2 and err.splitlines()[-1].startswith(f"error: {message}"), err


def test_long_resume_without_a_terminal(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A log line comes before anything is embedded, when a run goes past many shards."""
    clock = iter(range(0, 1000, 31))
    monkeypatch.setattr("e5v_jax.encode.progress.time.monotonic", lambda: float(next(clock)))
    monkeypatch.setattr("sys.stderr", io.StringIO())
    caplog.set_level("INFO", "e5v_jax")
    with BulkProgress(100, Statistics()) as progress:
        progress.passed(40)
        progress.encoded(10)
    first, second = caplog.messages
    assert first.startswith("40 of 100 rows, 0.0 items/s") and "left" not in first
    assert second.startswith("50 of 100 rows") and second.endswith(" s left")


# --- killed for real -----------------------------------------------------------------------------


def start(model_folder: Path, source: Path, output: Path, *flags: str) -> subprocess.Popen[str]:
    words = ["--model", model_folder, "--input", source, "--output", output, "--shard-size", "3"]
    words += ["--dtype", "float32", "--on-error", "skip", *flags]
    return subprocess.Popen(
        [sys.executable, "-m", "e5v_jax.encode", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts and images, some of them bad."""
    folder = tmp_path_factory.mktemp("mixed")
    names = ugly_images(folder / "photos")
    rows = [{"image": f"photos/{name}"} for name in names]
    rows += [{"text": text} for text in TEXTS]
    rows += [{"text": "smaller", "image": "photos/plain.png"}, {"text": " "}]
    order = np.random.default_rng(1).permutation(len(rows))
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(rows[i]) for i in order))
    return folder / "rows.jsonl"


@pytest.fixture(scope="module")
def whole(model_folder: Path, mixed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of an uninterrupted run of one process."""
    output = tmp_path_factory.mktemp("whole") / "out"
    process = start(model_folder, mixed, output)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return output


def kill_until_done(
    model_folder: Path, source: Path, output: Path, *, kills: int, seconds: float
) -> int:
    """Run again and again, SIGKILL it ``kills`` times; how many kills found it at work."""
    rng = np.random.default_rng(7)
    hit = 0
    for _ in range(kills):
        process = start(model_folder, source, output)
        before = len(list(output.glob("shard-*"))) if output.exists() else 0
        deadline = time.monotonic() + 60
        # until it is past loading: a kill before that would test nothing
        while len(list(output.glob("shard-*"))) <= before and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(rng.uniform(0, seconds))
        hit += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.communicate()
    process = start(model_folder, source, output)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return hit


def check_killed_run(
    model_folder: Path, mixed: Path, whole: Path, tmp_path: Path, *, kills: int, seconds: float
) -> None:
    hit = kill_until_done(model_folder, mixed, tmp_path / "killed", kills=kills, seconds=seconds)
    assert hit >= min(kills, 2)
    assert contents(tmp_path / "killed") == contents(whole)
    ids, _ = read_embeddings(tmp_path / "killed")
    failed = [json.loads(line)["id"] for line in (tmp_path / "killed/failed.jsonl").open()]
    rows = len(mixed.read_text().splitlines())
    assert sorted(ids + failed, key=int) == [str(i) for i in range(1, rows + 1)]


def test_killed_twice(model_folder: Path, mixed: Path, whole: Path, tmp_path: Path) -> None:
    """Byte for byte what an uninterrupted run writes; no row lost or there twice."""
    check_killed_run(model_folder, mixed, whole, tmp_path, kills=2, seconds=0.05)


@pytest.mark.slow
def test_killed_ten_times(model_folder: Path, mixed: Path, whole: Path, tmp_path: Path) -> None:
    check_killed_run(model_folder, mixed, whole, tmp_path, kills=10, seconds=0.5)


def start_two(*args: Any) -> list[subprocess.Popen[str]]:
    """:func:`start` as process 0 and process 1 of jax.distributed."""
    port = 20000 + os.getpid() % 20000
    processes = []
    for index in range(2):
        os.environ.update(
            JAX_COORDINATOR_ADDRESS=f"localhost:{port}",
            JAX_NUM_PROCESSES="2",
            JAX_PROCESS_ID=str(index),
        )
        processes.append(start(*args, "--distributed"))
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        del os.environ[name]
    return processes


def test_two_processes_and_workers(
    model_folder: Path, mixed: Path, whole: Path, tmp_path: Path
) -> None:
    """Two processes of jax.distributed, each with worker processes: the same bytes."""
    for process in start_two(model_folder, mixed, tmp_path / "shared", "--num-workers", "1"):
        _, err = process.communicate(timeout=180)
        assert process.returncode == 0, err
    assert contents(tmp_path / "shared") == contents(whole)


@pytest.mark.slow
def test_two_processes_know_of_repeated_ids(model_folder: Path, tmp_path: Path) -> None:
    """Only one of them looks for them; both leave them out of their shards, or both stop."""
    rows = [{"id": str(i % 7), "text": text} for i, text in enumerate(TEXTS)]
    source = jsonl(tmp_path / "a.jsonl", rows)
    for process in start_two(model_folder, source, tmp_path / "out", "--on-error", "raise"):
        _, err = process.communicate(timeout=180)
        assert process.returncode == 1
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        assert lines == [f"error: {source}:8: id '0' is taken: see {source}:1"]
    for process in start_two(model_folder, source, tmp_path / "out"):
        _, err = process.communicate(timeout=180)
        assert process.returncode == 0, err
    assert read_embeddings(tmp_path / "out")[0] == [str(i) for i in range(7)]
    failed = [json.loads(line)["where"] for line in (tmp_path / "out/failed.jsonl").open()]
    assert failed == [f"{source}:{row}" for row in range(8, 24)]


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no shard there"):
        read_embeddings(str(tmp_path))
