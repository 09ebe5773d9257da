"""A URL where only a path can be is refused, not written to a folder called gs: or s3:."""

from pathlib import Path

import pytest

from e5v_jax.cli import UsageError, refuse_remote_paths
from e5v_jax.train.__main__ import main
from e5v_jax.train.config import DataConfig, TrainConfig


def test_training_refuses_a_url(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["--model", "base", "--output", "s3://bucket/runs/x", "--data.path", "a.csv"])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "s3://bucket/runs/x" in line and "mount" in line
    assert list(tmp_path.iterdir()) == []


def test_paths_at_any_depth() -> None:
    inside = DataConfig(path=(Path("here.csv"), Path("gs://b/x.csv")))
    with pytest.raises(UsageError, match=r"gs://b/x\.csv"):
        refuse_remote_paths(TrainConfig(Path("base"), Path("out"), data=inside))


@pytest.mark.parametrize("path", ["runs/x", "/bucket/x", "bucket:x/y", "", "~/x", "C:/x"])
def test_file_paths_pass(path: str) -> None:
    refuse_remote_paths(TrainConfig(Path("base"), Path(path)))
