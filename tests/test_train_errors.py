"""Bad input to a training run: one line that names file, row or field, and no run folder."""

from pathlib import Path

import pytest
from hf_models import build_text
from test_train_run import RECIPE, words, write_csv

from e5v_jax.checkpoints import from_hf
from e5v_jax.lock import hold
from e5v_jax.train.__main__ import main

GOOD = b"sent0,sent1,hard_neg\nA dog.,A hound.,A cat.\nTwo men.,Men.,No men.\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("errors")
    build_text(RECIPE, folder / "hf")
    from_hf.convert(from_hf.Args(str(folder / "hf"), folder / "base"))
    write_csv(folder / "data.csv")
    return folder


def refuse(folder: Path, run: Path, capsys: pytest.CaptureFixture[str], *flags: str | Path) -> str:
    """The one line that a run which must not begin prints; later flags win over ``words``."""
    with pytest.raises(SystemExit) as exit_:
        main([*words(folder, run), *map(str, flags)])
    err = capsys.readouterr().err
    assert exit_.value.code == 1, err
    assert len(err.splitlines()) == 1 and err.startswith("error: "), err
    assert not run.exists()
    assert not list(run.parent.glob(".*.tmp"))
    return err.strip()


@pytest.mark.parametrize(
    ("data", "words_of_error"),
    [
        (GOOD.replace(b"sent1", b"other"), ["sent1"]),
        (GOOD.replace(b"A hound.", b" "), [":2", "sent1", "empty"]),
        (GOOD.replace(b"Two men.", b"Two m\xe9n."), ["3", "UTF-8"]),
        (b"", ["empty"]),
        (GOOD, ["batch"]),
    ],
    ids=["column", "empty-sentence", "encoding", "empty-file", "too-few-rows"],
)
def test_bad_data(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    data: bytes,
    words_of_error: list[str],
) -> None:
    file = tmp_path / "bad.csv"
    file.write_bytes(data)
    line = refuse(folder, tmp_path / "run", capsys, "--data.path", file)
    if data is not GOOD:
        assert str(file) in line
    for word in words_of_error:
        assert word in line, line


def test_missing_data(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "none.csv"
    assert str(missing) in refuse(folder, tmp_path / "run", capsys, "--data.path", missing)


def test_bad_prompt(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refuse(folder, tmp_path / "run", capsys, "--data.prompt", "image")
    assert line.startswith("error: data.prompt: 'image' is no prompt for texts; expected text")


def test_model_that_is_not_converted(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refuse(folder, tmp_path / "run", capsys, "--model", folder / "hf")
    assert "not a converted folder" in line and "run: e5v-convert" in line


@pytest.mark.parametrize(
    "flag", ["log-every", "checkpoint-every", "max-steps", "data.length-groups"]
)
def test_counts_of_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    line = refuse(folder, tmp_path / "run", capsys, f"--{flag}", "0")
    assert line == f"error: {flag.replace('-', '_')}: 0, expected at least 1"


def test_offloading_keeps_a_whole_batch(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--remat", "offload_dots", "--chunk-size", "6"]
    line = refuse(folder, tmp_path / "run", capsys, *flags)
    assert line == "error: remat: offload_dots keeps a whole batch: leave chunk_size (6) out"


def test_model_that_is_not_there(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refuse(folder, tmp_path / "run", capsys, "--model", tmp_path / "none")
    assert f"{tmp_path / 'none'}: no such folder" in line and "e5v-convert" in line


@pytest.mark.parametrize(
    ("flag", "value", "expected"),
    [
        ("loss.temperature", "0", "more than 0 and at most 100"),
        ("loss.temperature", "-0.1", "more than 0 and at most 100"),
        ("loss.temperature", "nan", "more than 0 and at most 100"),
        ("optimizer.learning-rate", "-1e-4", "more than 0 and at most 1"),
        ("optimizer.learning-rate", "nan", "more than 0 and at most 1"),
        ("optimizer.learning-rate", "1e39", "more than 0 and at most 1"),
        ("optimizer.warmup-steps", "-5", "0 or more"),
        ("optimizer.b1", "1", "0 or more and at most 1"),
        ("optimizer.b2", "nan", "0 or more and at most 1"),
        ("optimizer.eps", "0", "more than 0 and at most 1"),
        ("optimizer.weight-decay", "-1", "0 or more and at most 1"),
        ("optimizer.max-grad-norm", "0", "more than 0"),
        ("optimizer.accumulate-steps", "-2", "at least 1"),
        ("loss.matryoshka-dims", "0", "at least 1 each"),
        ("loss.matryoshka-dims", "33", "at most 32"),
        ("lora.rank", "0", "at least 1"),
        ("lora.rank", "1000000", "at most 32"),
        ("lora.alpha", "inf", "more than 0 and at most 1e+06"),
        ("lora.dropout", "1", "0 or more and at most 1"),
        ("seed", "-1", "0 or more and at most 4.29497e+09"),
        ("mesh.data", "0", "at least 1, or -1 for what is left"),
        ("batch-size", "0", "at least 1"),
        ("allow-change", "seed", "pass --resume with it"),
    ],
)
def test_impossible_values(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flag: str,
    value: str,
    expected: str,
) -> None:
    """They are refused by the name of the option, before anything is loaded."""
    line = refuse(folder, tmp_path / "run", capsys, f"--{flag}={value}")
    assert line.startswith(f"error: {flag.replace('-', '_')}: ") and expected in line, line


def test_an_output_in_use(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    with hold(run):
        assert "in use by process" in refuse(folder, run, capsys)
    assert not list(tmp_path.glob(".*"))
