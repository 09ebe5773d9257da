"""The command that scores STS: what it writes, refuses and leaves behind."""

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from sts_files import STSB, bag_of_words, evaluate_sts, write_years

import e5v_jax
from e5v_jax import cli
from e5v_jax.evaluate.command import evaluate
from e5v_jax.evaluate.config import EvaluateConfig
from e5v_jax.evaluate.files import any_text
from e5v_jax.evaluate.sts import (
    PAPER_TASKS,
    load_task,
)
from e5v_jax.evaluate.tasks import choose_tasks
from e5v_jax.exits import guarded
from e5v_jax.presets import E5_V
from e5v_jax.prompts import PROMPTS


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
    with pytest.raises(SystemExit) as exit_, guarded(words):
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
