"""The encode command: its inputs, its outputs, and what it says about bad ones."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hf_models import RECIPES, build_llava, picture
from PIL import Image

from e5v_jax import E5V
from e5v_jax.checkpoints import from_hf
from e5v_jax.data.images import FORMATS
from e5v_jax.data.inputs import InputError
from e5v_jax.data.rows import shortened
from e5v_jax.encode.__main__ import main as encode
from e5v_jax.encode.command import label
from e5v_jax.encode.files import IMAGE_SUFFIXES, make_item, read_items

NO_IMAGE = f"not an image in a format that is read: {', '.join(FORMATS)}"
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random LLaVA-NeXT model, converted."""
    folder = tmp_path_factory.mktemp("model")
    build_llava(RECIPES["llama-gqa"], folder / "hf")
    from_hf.convert(from_hf.Args(str(folder / "hf"), folder / "converted"))
    return folder / "converted"


@pytest.fixture(scope="module")
def model(model_folder: Path) -> E5V:
    return E5V.from_pretrained(model_folder, dtype="float32")


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Run the command in this process: exit code, stdout, stderr."""

    def run(*argv: str | Path) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit_:
            encode([str(word) for word in argv])
        assert isinstance(exit_.value.code, int)
        return exit_.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def load_calls(model: E5V, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Give the command the model that is loaded and compiled; what it asks for is recorded."""
    calls = []

    def from_pretrained(path: str, **kwargs: Any) -> E5V:
        calls.append({"path": path, **kwargs})
        return model

    monkeypatch.setattr(E5V, "from_pretrained", from_pretrained)
    return calls


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a model is an error: the command must find the mistake before."""

    def from_pretrained(path: str, **kwargs: Any) -> E5V:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(E5V, "from_pretrained", from_pretrained)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder with two images, a text file, a hidden file and a folder."""
    folder = tmp_path / "photos"
    (folder / "inner.png").mkdir(parents=True)
    picture(40, 60, seed=1).save(folder / "b.png")
    picture(50, 30, seed=2).save(folder / "A.JPG")
    (folder / "notes.txt").write_text("not an image")
    (folder / ".hidden.png").write_bytes(b"not an image")
    return folder


def vectors_of(path: Path) -> np.ndarray:
    vectors = np.load(path)
    assert vectors.dtype == np.float32
    return vectors


# --- outputs ---


def test_real_command_writes_what_the_api_computes(
    model: E5V, model_folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.npy"
    words = ["--model", model_folder, "--text", "a dog", "--output", output, "--dtype", "float32"]
    done = subprocess.run(
        [sys.executable, "-m", "e5v_jax.encode", *map(str, words)], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{output}: 1 vector of 64 dimensions, float32\n"
    np.testing.assert_allclose(vectors_of(output), model.encode(["a dog"]), atol=1e-6)
    assert sorted(tmp_path.iterdir()) == [output]


@pytest.mark.usefixtures("load_calls")
def test_similarity_table(command: Command, model: E5V, photos: Path) -> None:
    words = ("--text", "a [bold]dog", "a cat", "--text", "-5 degrees", "--image", photos / "b.png")
    code, out, err = command("--model", "any", *words)
    assert (code, err) == (0, "")
    labels = ["a [bold]dog", "a cat", "-5 degrees", "b.png"]
    vectors = model.encode([*labels[:3], photos / "b.png"])
    expected = [
        f"{number} {name} " + " ".join(f"{cosine:.3f}" for cosine in row)
        for number, (name, row) in enumerate(zip(labels, vectors @ vectors.T, strict=True), start=1)
    ]
    rows = [" ".join(line.split()) for line in out.splitlines()]
    assert rows == ["1 2 3 4", *expected, "cosine similarity"]


@pytest.mark.usefixtures("load_calls")
def test_twenty_rows_are_shown_whole_and_more_are_not(command: Command, tmp_path: Path) -> None:
    file = tmp_path / "texts.txt"
    file.write_text("".join(f"text {i}\n" for i in range(20)))
    code, out, _ = command("--model", "any", "--input", file)
    rows = out.splitlines()[1:-1]
    assert code == 0 and len(rows) == 20
    assert all(len(row.split()) == 1 + 2 + 20 for row in rows)  # number, label, cosines
    assert "…" not in out
    file.write_text(file.read_text() + "one more\n")
    code, out, err = command("--model", "any", "--input", file)
    message = "21 inputs and no --output: give a file to write to, or 2 to 20 inputs to compare"
    assert (code, out, err) == (2, "", f"error: {message}\n")


@pytest.mark.usefixtures("load_calls")
@pytest.mark.parametrize(
    ("flags", "options"),
    [
        ([], {}),
        (["--no-normalize"], {"normalize_embeddings": False}),
        (["--truncate-dim", "7"], {"truncate_dim": 7}),
        (["--prompt-name", "sts"], {"prompt_name": "sts"}),
        (["--prompt", "<sent> means"], {"prompt": "<sent> means"}),
    ],
)
def test_options_reach_encode(
    command: Command, model: E5V, tmp_path: Path, flags: list[str], options: dict[str, Any]
) -> None:
    output = tmp_path / "out.npy"
    texts = ["a dog", "two cats"]
    code, _, _ = command("--model", "any", "--text", *texts, "--output", output, *flags)
    assert code == 0
    np.testing.assert_array_equal(vectors_of(output), model.encode(texts, **options))


def test_options_reach_the_model(
    command: Command, load_calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    original = E5V.encode

    def spy(self: E5V, *args: Any, batch_size: int | None, **kwargs: Any) -> np.ndarray:
        sizes.append(batch_size)
        return original(self, *args, batch_size=batch_size, **kwargs)

    monkeypatch.setattr(E5V, "encode", spy)
    code, _, _ = command("--model", "m", "--text", "a dog", "two cats")
    assert code == 0
    flags = ["--dtype", "float32", "--adapter", "lora", "--template", "chatml", "--batch-size", "3"]
    flags += ["--quantize", "int8", "--attn-implementation", "xla", "--revision", "v2"]
    flags += ["--verify", "--preset", "bge-vl-mllm", "--max-pixels", "90", "--min-pixels", "7"]
    code, _, _ = command("--model", "other", "--text", "a dog", "two cats", *flags)
    assert code == 0
    meshes = [dict(call.pop("mesh").shape) for call in load_calls]
    assert meshes == 2 * [{"data": len(jax.devices()), "fsdp": 1, "tensor": 1}]
    plain = {"dtype": "bfloat16", "adapter": None, "template": None, "quantize": None}
    plain |= {"revision": None, "verify": False, "preset": None}
    plain |= {"min_pixels": None, "max_pixels": None}
    assert load_calls == [
        {"path": "m", **plain, "attn_implementation": "auto"},
        {
            "path": "other",
            "dtype": "float32",
            "adapter": Path("lora"),
            "preset": "bge-vl-mllm",
            "min_pixels": 7,
            "max_pixels": 90,
            "template": "chatml",
            "quantize": "int8",
            "attn_implementation": "xla",
            "revision": "v2",
            "verify": True,
        },
    ]
    assert sizes == [None, 3]


@pytest.mark.usefixtures("load_calls")
def test_jsonl_to_parquet(command: Command, model: E5V, photos: Path, tmp_path: Path) -> None:
    image = photos / "b.png"
    rows = [
        {"id": "dog", "text": "a dog  sleeps "},
        {"text": "smaller", "image": "photos/b.png", "id": 7},
        {"text": None, "image": str(image)},
    ]
    file = tmp_path / "rows.jsonl"
    # U+2028 ends a line for str.splitlines, in no editor
    lines = [json.dumps(rows[0]), "", *map(json.dumps, rows[1:]), '{"text": "a\u2028b"}']
    file.write_text("\r\n".join(lines), encoding="utf-8-sig")
    output = tmp_path / "out.parquet"
    code, out, err = command("--model", "any", "--input", file, "--output", output)
    assert (code, err) == (0, "")
    assert out == f"{output}: 4 vectors of 64 dimensions, float32\n"
    table = pq.read_table(output)
    assert table.schema.names == ["id", "embedding"]
    assert table.schema.field("id").type == pa.string()
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), 64)
    assert table["id"].to_pylist() == ["dog", "7", "4", "5"]
    expected = model.encode(
        ["a dog  sleeps ", {"text": "smaller", "image": image}, image, "a\u2028b"]
    )
    np.testing.assert_array_equal(np.array(table["embedding"].to_pylist()), expected)


@pytest.mark.usefixtures("load_calls")
def test_folder_of_images(command: Command, model: E5V, photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.parquet"
    code, _, err = command("--model", "any", "--input", photos, "--output", output)
    assert code == 0
    assert err == f"{photos}: left out, not an image file: inner.png, notes.txt\n"
    table = pq.read_table(output)
    assert table["id"].to_pylist() == ["A.JPG", "b.png"]
    expected = model.encode([photos / "A.JPG", photos / "b.png"])
    np.testing.assert_array_equal(np.array(table["embedding"].to_pylist()), expected)


@pytest.mark.usefixtures("load_calls")
@pytest.mark.parametrize("suffix", [".npy", ".parquet"])
def test_failed_write_leaves_nothing(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    def fail(first: Any, second: Any, *_: Any) -> None:
        (first if suffix == ".npy" else second).write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*((np, "save") if suffix == ".npy" else (pq, "write_table")), fail)
    output = tmp_path / f"out{suffix}"
    code, out, err = command("--model", "any", "--text", "a dog", "--output", output)
    assert (code, out) == (1, "") and err == (
        f"error: {output}: No space left on device: free some space there, then start it again\n"
    )
    assert list(tmp_path.iterdir()) == []


# --- inputs ---


def test_csv(photos: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text(
        'image,text\r\n,"a ""dog""\r\nsleeps"\r\n\r\nphotos/b.png,\r\nphotos/b.png,smaller\r\n',
        encoding="utf-8-sig",
        newline="",
    )
    image = photos / "b.png"
    items, skipped = read_items(file)
    assert [(item.where, item.id, item.value) for item in items] == [
        (f"{file}:2", "2", {"text": 'a "dog"\r\nsleeps'}),
        (f"{file}:5", "5", {"image": image}),
        (f"{file}:6", "6", {"text": "smaller", "image": image}),
    ]
    assert skipped == []


def test_txt_keeps_the_text_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "texts.TXT"
    file.write_bytes('\ufeff a dog\u2028 \r\nné,"quoted"'.encode())
    assert [(item.id, item.value) for item in read_items(file)[0]] == [
        ("1", {"text": " a dog\u2028 "}),
        ("2", {"text": 'né,"quoted"'}),
    ]


def test_label_is_short_and_printable() -> None:
    text = "a\tdog\x1b[2J " + 40 * "long "
    item = make_item("--text 1", "text-1", text=text, image=None)
    assert label(item) == "a dog\ufffd[2J long long long long l…"
    assert len(label(item)) == 32
    both = make_item("x:1", "1", text="b", image=Path(__file__).name, folder=Path(__file__).parent)
    assert label(both) == "test_encode_cli.py + b"


BAD_FILES = [
    ("a.txt", b"a dog\n\na cat\n", "a.txt:2: the text is empty"),
    ("a.txt", b"a dog\n \t\r\n", "a.txt:2: the text is empty"),
    ("a.txt", b"", "a.txt: nothing to embed"),
    (
        "a.txt",
        "a dog\ncafé\n".encode("latin-1"),
        "a.txt:2: not UTF-8 (byte 0xe9): save the file as UTF-8",
    ),
    (
        "a.csv",
        "id,text\n1,a\n2,café\n".encode("latin-1"),
        "a.csv:3: not UTF-8 (byte 0xe9): save the file as UTF-8",
    ),
    (
        "a.txt",
        b"\xef\xbb\xbfa\n\xff\n",
        "a.txt:2: not UTF-8 (byte 0xff): save the file as UTF-8",
    ),
    ("a.csv", b"id,caption\n1,a\n", "a.csv:1: no column text or image; found ['id', 'caption']"),
    (
        "a.csv",
        b"text,Image\na,b\n",
        "a.csv:1: unknown column 'Image', expected id, text, image: rename or remove it",
    ),
    ("a.csv", b"text,id,text\na,b,c\n", "a.csv:1: column text is there twice"),
    ("a.csv", b"id,text\n1,a\n2\n", "a.csv:3: 1 fields, expected 2: ['id', 'text']"),
    ("a.csv", b'id,text\n1,"a\nb"\n2,\n', "a.csv:4: the text is empty"),
    ("a.csv", b"text,image\na,\n,\n", "a.csv:3: the text is empty"),
    ("a.csv", b"id,image\n1,\n", "a.csv:2: image is empty"),
    ("a.csv", b'text\na\n"b\nc\n', "a.csv:3: broken csv: unexpected end of data"),
    ("a.csv", b"id,text\n1,a\n,b\n", "a.csv:3: the id is empty"),
    ("a.csv", b"id,text\n1,a\n2,b\n1,c\n", "a.csv:4: id '1' is taken: see a.csv:2"),
    ("a.csv", b"id,text\n", "a.csv: nothing to embed"),
    (
        "a.jsonl",
        b'{"text": "a"}\n\n{"text": "b"\n',
        "a.jsonl:3: broken json: Expecting ',' delimiter, character 13",
    ),
    ("a.jsonl", b'["a"]\n', 'a.jsonl:1: found ["a"], expected an object'),
    (
        "a.jsonl",
        b'{"text": "a"}\n{"id": 1}\n',
        "a.jsonl:2: neither text nor image is given",
    ),
    ("a.jsonl", b'{"text": ""}\n', "a.jsonl:1: the text is empty"),
    ("a.jsonl", b'{"text": "a", "image": ""}\n', "a.jsonl:1: image is empty"),
    ("a.jsonl", b'{"text": 5}\n', "a.jsonl:1: text is of type int, not a string"),
    ("a.jsonl", b'{"text": "a", "id": true}\n', "a.jsonl:1: id is of type bool, not a string"),
    ("a.jsonl", b'{"txt": "a"}\n', "a.jsonl:1: unknown key 'txt', expected id, text, image"),
    (
        "a.jsonl",
        b'{"id": 2, "text": "a"}\n{"text": "b"}\n',
        "a.jsonl:2: id '2' is taken: see a.jsonl:1",
    ),
    ("a.jsonl", b'{"image": "x.png"}\n', "a.jsonl:1: image x.png: no such file"),
    ("a.csv", b"image\nx\x00.png\n", "a.csv:2: image 'x\\x00.png': no such file"),
    (
        "a.csv",
        b"text,image\na,https://example.com/a.png\n",
        "a.csv:2: image https://example.com/a.png: URLs are not fetched; download it and give "
        "its path",
    ),
    (
        "a.tsv",
        b"a",
        "a.tsv: unknown suffix '.tsv', expected .txt, .jsonl, .csv, .parquet or a folder of images",
    ),
    ("a.txt", None, "a.txt: no such file or folder"),
]


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES)
def test_bad_file_is_told_before_the_model_loads(
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    content: bytes | None,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path(name).write_bytes(content)
    code, out, err = command("--model", "any", "--input", name, "--output", "out.npy")
    assert (code, out, err) == (1, "", f"error: {message}\n")
    assert not list(tmp_path.glob("*out*"))


MORE_BAD_FILES = [
    ("a.jsonl", b"[" * 99999, "a.jsonl:1: broken json: maximum recursion depth"),
    ("a.jsonl", b'{"text": NaN}', "a.jsonl:1: text is of type float, not a string"),
    ("a.jsonl", b'{"id": 1' + 5000 * b"0" + b"}", "a.jsonl:1: broken json: Exceeds the limit"),
    (
        "a.jsonl",
        b'{"text": "\\ud800"}',
        "a.jsonl:1: the text contains the lone surrogate '\\ud800': ",
    ),
    ("a.jsonl", b'{"image": "a\\nb"}', "a.jsonl:1: image 'a\\nb': no such file"),
    ("a.jsonl", b'{"image": "pipe"}', "a.jsonl:1: image pipe: no file, but a folder, a pipe or "),
    ("a.jsonl", b'{"image": "loop"}', "a.jsonl:1: image loop: no such file"),
    ("a.csv", b"text\n" + 200_000 * b"a", "a.csv:2: broken csv: field larger than field limit"),
    ("pipe.jsonl", "pipe", "pipe.jsonl: no file, but a folder, a pipe or the like"),
    ("pipe.png", "pipe", "pipe.png: unknown suffix '.png', expected .txt"),
    ("loop.csv", "loop", "loop.csv: no such file or folder"),
    ("a.jsonl", "folder", "a.jsonl: no image file (.apng, .avif, "),
    ("no/*.jsonl", None, "no/*.jsonl: matches no file"),
    (300 * "a", None, f"{300 * 'a'}: File name too long"),
]


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(("name", "content", "message"), MORE_BAD_FILES)
def test_odd_file_is_told_before_the_model_loads(
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    content: bytes | str | None,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    os.symlink("loop", "loop")
    if isinstance(content, bytes):
        Path(name).write_bytes(content)
    elif content is not None:
        {"pipe": os.mkfifo, "loop": lambda to: os.symlink(to, to), "folder": os.mkdir}[content](
            name
        )
    code, out, err = command("--model", "any", "--input", name, "--output", "out.npy")
    assert (code, out) == (1, "")
    assert err.startswith(f"error: {message}") and err.count("\n") == 1


@pytest.mark.usefixtures("no_model")
@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_permission(command: Command, tmp_path: Path) -> None:
    for path in (tmp_path / "a.jsonl", tmp_path / "a.parquet", tmp_path / "folder"):
        path.mkdir() if path.suffix == "" else path.write_text("{}")
        path.chmod(0)
        code, out, err = command("--model", "any", "--input", path, "--output", tmp_path / "o.npy")
        assert (code, out, err) == (1, "", f"error: {path}: Permission denied\n")


def test_an_error_of_the_disk_is_no_broken_parquet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a"]}), file)

    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(5, "Input/output error", str(file))

    monkeypatch.setattr(pq, "ParquetFile", fail)
    with pytest.raises(OSError, match="Input/output error") as error:
        read_items(file)
    assert error.value.errno == 5


def test_a_value_too_deep_to_show() -> None:
    value: list[Any] = []
    for _ in range(100_000):
        value = [value]
    assert shortened(value) == "brackets in brackets, too deep"
    while value:  # else Python's own clean-up is as deep
        (value,) = value


def test_parquet_that_lies_about_its_rows(tmp_path: Path) -> None:
    """It is refused where it says other numbers, or read as it was where nobody asks."""
    file = tmp_path / "a.parquet"
    texts = [f"text {i}" for i in range(300)]
    pq.write_table(pa.table({"text": texts}), file, row_group_size=100)
    data, hundred = file.read_bytes(), b"\x16\xc8\x01"  # thrift's 100
    places = [i for i in range(len(data)) if data[i:].startswith(hundred)]
    refused = 0
    for place in places:
        for lie in (b"\x16\xc7\x01", b"\x16\xc8\x7f"):  # -100 and 8164
            file.write_bytes(data[:place] + lie + data[place + 3 :])
            try:
                assert [item.value["text"] for item in read_items(file)[0]] == texts
            except ValueError as error:
                refused += 1
                assert str(error).startswith(f"{file}") and str(error).isprintable()
    assert refused >= 6


def test_brackets_are_as_written_where_they_exist(photos: Path) -> None:
    """In a folder, in the folder of a pattern; and elsewhere they are the pattern's."""
    literal = photos.rename(photos.with_name("photos[1]"))
    (literal / "inner.png").rmdir()
    other = literal.with_name("photos1")
    other.mkdir()
    picture(9, 9).save(other / "c.png")

    def ids(source: Path) -> list[str]:
        return [Path(item.id).name for item in read_items(source)[0]]

    assert ids(literal) == ["A.JPG", "b.png"]
    assert ids(literal / "*.png") == ["b.png"]
    assert ids(literal.with_name("photos[0-9]") / "*.png") == ["c.png"]
    assert ids(literal.with_name("p*") / "[bc].png") == ["c.png", "b.png"]


@pytest.mark.usefixtures("load_calls")
def test_a_name_that_is_not_utf8(
    command: Command, model_folder: Path, photos: Path, tmp_path: Path
) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    (photos / "b.png").rename(photos / name)
    words = ("--model", model_folder, "--input", photos, "--output", tmp_path / "out")
    code, out, err = command(*words)
    assert (code, out) == (1, "")
    message = f"{photos}: the file's name is not UTF-8: rename 'caf\\udce9.png'"
    assert err.splitlines()[-1] == f"error: {message}"
    code, out, _ = command(*words, "--on-error", "skip")
    assert code == 0 and "1 of 2 rows embedded" in out
    (row,) = map(json.loads, (tmp_path / "out" / "failed.jsonl").read_text().splitlines())
    assert row["id"] == "caf\\udce9.png" and "not UTF-8" in row["reason"]


@pytest.mark.usefixtures("load_calls")
def test_an_output_that_is_not_utf8(command: Command, tmp_path: Path) -> None:
    output = tmp_path / os.fsdecode(b"caf\xe9.npy")
    code, out, err = command("--model", "any", "--text", "a dog", "--output", output)
    assert (code, err) == (0, "") and "caf\\udce9.npy: 1 vector of" in out
    assert vectors_of(output).shape == (1, 64)


def test_files_that_vanish(photos: Path, model: E5V) -> None:
    """Between the look at a folder and the reading of its images."""
    items, _ = read_items(photos)
    (photos / "b.png").unlink()
    errors: list[InputError] = []
    vectors = model.encode([item.value for item in items], on_error=errors.append)
    assert [(error.position, error.reason) for error in errors] == [
        (1, f"{photos / 'b.png'}: no such file")
    ]
    assert np.linalg.norm(vectors, axis=1).round(3).tolist() == [1, 0]


def test_folder_without_images(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a dog")
    with pytest.raises(ValueError, match=f"no image file .*{IMAGE_SUFFIXES[0]}"):
        read_items(tmp_path)


@pytest.fixture
def bad_images(tmp_path: Path) -> None:
    picture(40, 60).save(tmp_path / "good.png")
    data = (tmp_path / "good.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.png").write_text("not an image")
    Image.new("1", (10_000, 10_000)).save(tmp_path / "bomb.png")  # 12 KB


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
@pytest.mark.usefixtures("load_calls", "bad_images")
@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": "cut.png"}, "cut.png: cannot be read as an image: "),
        (
            {"image": "text.png"},
            f"text.png: {NO_IMAGE}\n",
        ),
        ({"image": "."}, "image .: no file, but a folder, a pipe or the like\n"),
        ({"image": "bomb.png"}, "bomb.png: 10000x10000 pixels, more than the 89478485 allowed"),
        ({"text": "my <image> of"}, "the text contains '<image>' (at character 3), "),
        ({"text": "a<|eot_id|>"}, "the text contains '<|eot_id|>' (at character 1), "),
        ({"text": "</s>"}, "the text contains '</s>' (at character 0), "),
        ({"text": "\ud800"}, "the text contains the lone surrogate '\\ud800': "),
        ({"text": 2048 * "a"}, "2110 tokens, the model takes at most 2048: shorten the text, "),
    ],
)
def test_bad_row_is_named(
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    row: dict[str, str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"text": "a dog"}, {"image": "good.png"}, row]
    Path("a.jsonl").write_text("\n" + "\n".join(map(json.dumps, rows)))  # the row is on line 4
    flags = ("--output", "out.parquet", "--special-tokens", "refuse")
    code, out, err = command("--model", "any", "--input", "a.jsonl", *flags)
    assert (code, out) == (1, "")
    assert err.startswith(f"error: a.jsonl:4: {message}") and err.count("\n") == 1
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.usefixtures("load_calls", "bad_images")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--text", "a", " "], "--text 2: the text is empty"),
        (["--image", "good.png", "none.png"], "--image 2: image none.png: no such file"),
        (
            ["--image", "HTTP://x/a.png"],
            "--image 1: image HTTP://x/a.png: URLs are not fetched; download it and give its path",
        ),
        (
            ["--text", "a", "b", "--image", "good.png", "--image", "text.png"],
            f"--image 2: text.png: {NO_IMAGE}",
        ),
        (
            ["--text", "a", "--prompt", "<image> in a word"],
            "--text 1: the input has no image, the prompt '<image> in a word' takes one",
        ),
        (["--text", "a", "--truncate-dim", "65"], "truncate_dim 65: expected 1 to 64"),
    ],
)
def test_bad_flag_is_named(
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = command("--model", "any", *words, "--output", "out.npy")
    assert (code, out, err) == (1, "", f"error: {message}\n")
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("old.npy", "old.npy: already exists; choose another name or delete it"),
        ("old.txt", "old.txt: expected a name that ends in .npy or .parquet, or a folder"),
        ("none/a.npy", "none: no such folder; create it first"),
    ],
)
def test_bad_output_is_told_before_the_model_loads(
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    output: str,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("old.npy").write_bytes(b"old")
    code, out, err = command("--model", "any", "--text", "a dog", "--output", output)
    assert (code, out, err) == (1, "", f"error: {message}\n")
    assert Path("old.npy").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["old.npy"]


def test_unknown_model(command: Command, tmp_path: Path) -> None:
    code, out, err = command("--model", tmp_path / "none", "--text", "a dog", "a cat")
    assert (code, out, err) == (1, "", f"error: {tmp_path / 'none'}: no such folder or file\n")


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give --input, or --text and --image: one of the two"),
        (["--text", "a", "--input", "b"], "give --input, or --text and --image: one of the two"),
        (["--text", "a"], "1 input and no --output: give a file to write to, or 2 to 20 inputs"),
        (["--text", "a", "b", "--batch-size", "0"], "--batch-size: 0, expected at least 1"),
        (["--text", "a", "b", "--truncate-dim", "0"], "--truncate-dim: 0, expected at least 1"),
        (
            ["--text", "a", "b", "--prompt", "<sent>", "--prompt-name", "sts"],
            "give --prompt-name or --prompt, not both",
        ),
        (["--text", "a", "b", "--prompt-name", "x"], "prompt_name 'x': expected one of ['cirr_g"),
        (["--text", "a", "b", "--prompt", "x"], "prompt 'x' has no slot: "),
        (
            ["--text", "a", "b", "--prompt", "\udce9<sent>"],
            "prompt '\\udce9<sent>': not Unicode at",
        ),
        (["--text", "a", "b", "--prompt-name", "fashioniq_query"], "prompt '<image> change the"),
        (["--text", "a", "b", "--template", "x"], "--template: unknown 'x', expected one of lla"),
    ],
)
def test_wrong_usage(command: Command, words: list[str], message: str) -> None:
    code, out, err = command("--model", "any", *words)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {message}") and err.count("\n") == 1


def test_wrong_usage_needs_no_jax(tmp_path: Path) -> None:
    """Nor does a bad input: JAX takes seconds to import."""
    code = """
import sys
from e5v_jax.encode.__main__ import main

for words in (
    "--text a", "--text a --input b", "--text a b --prompt x", "--text a b --template x",
    "--text a --output none/a.npy", "--text a --output a.txt", "--input none.txt --output a.npy",
    "--input b --output c --shard-size 0", "--text a b --model ",
):
    try:
        main(["--model", "m", *words.split(" ")])
    except SystemExit as end:
        print(end.code, "jax" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert done.stderr.count("\n") == done.stderr.count("error: ") == 9, done.stderr
    assert done.stdout.split() == ["2", "False"] * 4 + ["1", "False"] * 3 + ["2", "False"] * 2


def test_the_api_names_the_position(model: E5V) -> None:
    with pytest.raises(InputError, match="input 1: the text is empty") as error:
        model.encode(["a dog", ""])
    assert error.value.position == 1
    assert error.value.reason.startswith("the text is empty")
