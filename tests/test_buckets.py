"""gs:// paths: convert, train, kill, resume and encode in a bucket of a Cloud Storage emulator."""

import dataclasses
import http.server
import importlib.util
import io
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cloud_storage import Emulator, emulate
from training_runs import (
    STEPS,
    assert_same_end,
    command,
    config,
    make_folder,
    read_metrics,
    start,
    words,
)

from e5v_jax import E5V, storage
from e5v_jax.checkpoints import commands, from_hf
from e5v_jax.encode.__main__ import main as encode
from e5v_jax.encode.bulk import read_embeddings
from e5v_jax.storage import as_path, walk_files
from e5v_jax.train.__main__ import main
from e5v_jax.train.config import DataConfig
from e5v_jax.train.loop import train

TEXTS = [f"Text number {i}: {'very ' * (i % 5)}short." for i in range(7)]
BUCKET = "gs://tests"


@pytest.fixture(scope="module")
def emulator() -> Iterator[Emulator]:
    with emulate("tests") as emulator:
        yield emulator


@pytest.fixture(scope="module")
def folder(emulator: Emulator, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and rows on this machine; the same are in the bucket."""
    folder = make_folder(tmp_path_factory.mktemp("run"))
    from_hf.convert(from_hf.Args(str(folder / "hf"), as_path(f"{BUCKET}/base")))
    as_path(f"{BUCKET}/data.csv").write_bytes((folder / "data.csv").read_bytes())
    return folder


def put_rows(name: str, rows: list[dict[str, str]]) -> str:
    path = as_path(f"{BUCKET}/{name}")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run_encode(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> tuple[int, str]:
    """(exit code, last line of stderr) of the encode command in this process."""
    with pytest.raises(SystemExit) as exit_:
        encode(["--dtype", "float32", *map(str, argv)])
    assert isinstance(exit_.value.code, int)
    return exit_.value.code, (capsys.readouterr().err.splitlines() or [""])[-1]


def test_converted_in_a_bucket(folder: Path) -> None:
    base, converted = folder / "base", as_path(f"{BUCKET}/base")
    small = [path for path in walk_files(converted) if "params" not in path.parts]
    names = {str(path.relative_to(converted)) for path in small}
    assert names == {path.name for path in base.iterdir() if path.is_file()}
    with pytest.raises(FileExistsError, match="gs://tests/base: already exists"):
        from_hf.convert(from_hf.Args(str(folder / "hf"), converted))

    ours = E5V.from_pretrained(f"{BUCKET}/base", dtype="float32").encode(TEXTS)
    assert np.array_equal(ours, E5V.from_pretrained(base, dtype="float32").encode(TEXTS))


def test_training(folder: Path, tmp_path: Path) -> None:
    """Model, rows and run in the bucket; the newest checkpoint is kept, the one before deleted."""
    source, run, local = as_path(BUCKET), as_path(f"{BUCKET}/short"), tmp_path / "short"
    cfg = config(folder, local, max_steps=4, checkpoint_every=2, keep_checkpoints=1)
    data = DataConfig(path=(source / "data.csv",), length_groups=1)
    train(cfg)
    train(dataclasses.replace(cfg, model=source / "base", data=data, output=run))
    assert_same_end(run, local, 4)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["4"]
    assert [line["step"] for line in read_metrics(run)] == [1, 2, 3, 4]
    assert any("tfevents" in path.name for path in walk_files(run / "tensorboard"))
    with pytest.raises(FileExistsError, match="gs://tests/short: already exists; pass --resume"):
        train(dataclasses.replace(cfg, output=run))


@pytest.mark.slow
def test_training_killed_and_resumed(folder: Path, emulator: Emulator, tmp_path: Path) -> None:
    cache, local, run = tmp_path / "cache", tmp_path / "finished", as_path(f"{BUCKET}/run")
    assert start(words(folder, local), cache=cache).wait() == 0
    argv = words(as_path(BUCKET), run)

    process = start(argv, cache=cache)
    emulator.on_write = lambda name: "checkpoints/6" in name and process.kill()
    process.communicate()
    emulator.on_write = lambda name: None
    assert process.returncode == -9
    assert (run / "checkpoints" / "3" / "commit_success.txt").exists()

    done = command([*argv, "--resume"], cache=cache)
    assert done.returncode == 0, done.stderr
    assert "from step 3\n" in done.stdout
    assert_same_end(run, local, STEPS)
    assert [line["step"] for line in read_metrics(run)] == list(range(1, STEPS + 1))
    kept = {path.name for path in (run / "checkpoints").iterdir()}
    assert kept == {path.name for path in (local / "checkpoints").iterdir()}


@pytest.mark.slow
def test_a_damaged_checkpoint_falls_back(folder: Path, tmp_path: Path) -> None:
    run, local = as_path(f"{BUCKET}/damaged"), tmp_path / "whole"
    for output in (run, local):
        train(config(folder, output))
    manifest = "state/manifest.ocdbt"
    (run / "checkpoints" / str(STEPS) / manifest).write_bytes(b"cut")
    train(config(folder, run, resume=True))
    assert (run / f"damaged-{STEPS}" / manifest).read_bytes() == b"cut"
    assert_same_end(run, local, STEPS)


@pytest.mark.slow
def test_all_weights_trained_from_a_bucket_to_a_bucket(folder: Path, tmp_path: Path) -> None:
    """The exported model: arrays and the base's other files."""
    source, run = as_path(BUCKET), as_path(f"{BUCKET}/full")
    data = DataConfig(path=(source / "data.csv",), length_groups=1)
    train(config(source, run, lora=None, max_steps=1, data=data))
    train(config(folder, tmp_path / "full", lora=None, max_steps=1))
    ours = E5V.from_pretrained(f"{BUCKET}/full/model", dtype="float32").encode(TEXTS)
    model = E5V.from_pretrained(tmp_path / "full" / "model", dtype="float32")
    assert np.array_equal(ours, model.encode(TEXTS))


@pytest.mark.parametrize("format", ["parquet", pytest.param("npy", marks=pytest.mark.slow)])
def test_encoding_in_bulk(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], format: str
) -> None:
    rows = put_rows("texts.jsonl", [{"id": f"row {i}", "text": x} for i, x in enumerate(TEXTS)])
    output, local = f"{BUCKET}/vectors-{format}", tmp_path / "vectors"
    flags = ["--model", folder / "base", "--shard-size", "3", "--format", format, "--input", rows]
    for target in (output, local):
        code, said = run_encode(capsys, *flags, "--output", target)
        assert code == 0, said
    ids, vectors = read_embeddings(output)
    expected = read_embeddings(local)
    assert ids == expected[0] == [f"row {i}" for i in range(len(TEXTS))]
    assert np.array_equal(vectors, expected[1])

    shard = as_path(output) / f"shard-00001.{format}"
    before = {path: path.read_bytes() for path in walk_files(as_path(output))}
    shard.unlink()  # as if killed before it
    code, said = run_encode(capsys, *flags, "--output", output)
    assert code == 0, said
    assert {path: path.read_bytes() for path in walk_files(as_path(output))} == before


def test_one_file_of_parquet_rows(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": TEXTS}), buffer)
    as_path(f"{BUCKET}/texts.parquet").write_bytes(buffer.getvalue())
    argv = ["--model", folder / "base", "--input", f"{BUCKET}/texts.parquet"]
    argv += ["--output", f"{BUCKET}/vectors.npy"]
    assert run_encode(capsys, *argv)[0] == 0
    vectors = np.load(io.BytesIO(as_path(f"{BUCKET}/vectors.npy").read_bytes()))
    expected = E5V.from_pretrained(folder / "base", dtype="float32").encode(TEXTS)
    assert np.array_equal(vectors, expected)
    assert run_encode(capsys, *argv) == (
        1,
        f"error: {BUCKET}/vectors.npy: already exists; choose another name or delete it",
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"--input": "none.jsonl"}, "gs://tests/none.jsonl: no such file"),
        ({"--input": "base"}, "gs://tests/base: in a bucket, expected one file of .txt"),
        ({"--input": "*.jsonl"}, "no such file"),
        ({"--input": "pictures.jsonl"}, "image a.jpg: not read from a bucket by its path"),
        ({"--model": "none"}, "gs://tests/none: no such folder"),
        ({"--model": "raw"}, "gs://tests/raw: only a converted folder can be read from a bucket"),
        ({"--output": "gs://other/vectors"}, "gs://other/vectors: there is no such bucket"),
        ({"--output": "gs://other/vectors.npy"}, "gs://other: there is no such bucket"),
        ({"--adapter": "none"}, "gs://tests/none: neither a PEFT adapter"),
        ({"--input": "s3://other/a.jsonl"}, "s3://other/a.jsonl: not a path on this machine"),
    ],
)
def test_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], flags: dict[str, str], message: str
) -> None:
    put_rows("pictures.jsonl", [{"image": "a.jpg"}])
    put_rows("rows.jsonl", [{"text": "A dog."}])
    put_rows("raw/config.json", [{"model_type": "llama"}])
    given = {"--input": "rows.jsonl", "--output": "refused", **flags}
    paths = {flag: x if "://" in x else f"{BUCKET}/{x}" for flag, x in given.items()}
    paths = {"--model": str(folder / "base"), **paths}
    code, said = run_encode(capsys, *[word for pair in paths.items() for word in pair])
    assert code in (1, 2) and message in said, said
    assert not as_path(f"{BUCKET}/refused").exists()


def closed_port() -> str:
    """An address where nobody answers, as without a network."""
    with socket.socket() as opened:
        opened.bind(("localhost", 0))
        return f"http://localhost:{opened.getsockname()[1]}"


@contextmanager
def refusing() -> Iterator[str]:
    """A Cloud Storage that knows no one."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            said = b'{"error": {"code": 401, "message": "Anonymous caller has no access"}}'
            self.send_response(401)
            self.send_header("Content-Length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("localhost", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://localhost:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("flag", ["--model", "--adapter", "--input", "--output", "file", "api"])
def test_no_network_and_no_credentials(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, flag: str
) -> None:
    """One line, at once; gcsfs would try for a minute, with a traceback for each request."""
    (tmp_path / "a.txt").write_text("A dog.")
    path = f"{BUCKET}/unseen{'.npy' if flag == 'file' else ''}"
    given = {"--model": tmp_path, "--input": tmp_path / "a.txt", "--output": tmp_path / "out"}
    given = {**given, {"file": "--output"}.get(flag, flag): path}
    with refusing() as server:
        for host, said in (
            (server, "Cloud Storage refuses (Anonymous caller has no access, 401): log in with gc"),
            (closed_port(), "does not answer (Connection refused): is there a network?"),
        ):
            monkeypatch.setenv("STORAGE_EMULATOR_HOST", host)
            storage.check_reachable.cache_clear()
            start = time.monotonic()
            if flag == "api":
                with pytest.raises(OSError, match=re.escape(said)):
                    E5V.from_pretrained(path)
            else:
                code, line = run_encode(capsys, *[word for pair in given.items() for word in pair])
                assert code == 1 and line.startswith(f"error: {path}: ") and said in line
            assert time.monotonic() - start < 5
    storage.check_reachable.cache_clear()


@pytest.mark.parametrize("flag", ["--model", "--output", "--data.path", "convert"])
def test_no_network_for_the_other_commands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, flag: str
) -> None:
    path = f"{BUCKET}/unseen"
    given = {"--model": "base", "--output": "run", "--data.path": "a.csv", flag: path}
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", closed_port())
    monkeypatch.chdir(tmp_path)
    storage.check_reachable.cache_clear()
    start = time.monotonic()
    with pytest.raises(SystemExit) as exit_:
        if flag == "convert":
            commands.convert(["hf", path])
        main([word for pair in given.items() for word in pair])
    storage.check_reachable.cache_clear()
    assert exit_.value.code == 1
    line = capsys.readouterr().err
    assert line.startswith(f"error: {path}: ") and "does not answer" in line
    assert time.monotonic() - start < 5 and not list(tmp_path.iterdir())


def test_images_of_training_rows(folder: Path) -> None:
    rows = put_rows("pairs.jsonl", [{"image0": "a.jpg", "sent1": f"Dog {i}."} for i in range(9)])
    data = DataConfig(path=(as_path(rows),))
    with pytest.raises(ValueError, match=r"gs://tests/pairs.jsonl:1: image0: images are not read"):
        train(dataclasses.replace(config(folder, as_path(f"{BUCKET}/none")), data=data))
    assert not as_path(f"{BUCKET}/none").exists()


def test_gcsfs_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda x: None if x == "gcsfs" else find(x))
    with pytest.raises(ImportError, match=r"gs://a/b: needs gcsfs: pip install"):
        as_path("gs://a/b")
    with pytest.raises(SystemExit) as exit_:
        main(["--model", "gs://a/base", "--output", "out", "--data.path", "a.csv"])
    assert exit_.value.code == 2
    assert "needs gcsfs" in capsys.readouterr().err
