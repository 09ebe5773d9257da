"""Exports that cannot be, and conversions that are cut short: nothing is left behind."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.numpy
from faults import file_size_limit
from refusals import Llava, make_text, run

from e5v_jax.checkpoints import from_hf, to_hf
from e5v_jax.checkpoints.commands import convert, export
from e5v_jax.checkpoints.converted import ConvertedFolder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text(tmp_path_factory.mktemp("text"))


def test_a_full_disk_is_one_line(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A limit of the size of files stands for it; no file of the arrays fits in."""
    (tmp_path / "out").mkdir()
    with file_size_limit(16_000):
        line = run(convert, capsys, text / "hf", tmp_path / "out" / "ours")
    assert line.startswith(f"error: {tmp_path / 'out' / 'ours'}: File too large: free some space")
    assert not list((tmp_path / "out").iterdir())


def test_export_errors(
    llava: Llava, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    line = run(export, capsys, text / "hf", out)
    assert f"{text / 'hf'}: not a converted folder" in line
    assert "already a converted folder" in run(convert, capsys, text / "ours", out)
    assert "nothere" in run(export, capsys, tmp_path / "nothere", out)
    assert "carries no adapter" in run(export, capsys, text / "ours", out, "--merge", code=2)
    assert "carries no adapter" in run(export, capsys, text / "ours", out, "--peft", code=2)
    line = run(export, capsys, text / "ours", out, "--merge", "--peft", code=2)
    assert "--merge, --peft" in line
    line = run(export, capsys, text / "ours", out, "--adapter", tmp_path)
    assert f"{tmp_path}: neither a PEFT adapter" in line
    shutil.copytree(text / "ours", tmp_path / "ours")
    (tmp_path / "ours" / "unused.safetensors").write_bytes(b"12345678")
    line = run(export, capsys, tmp_path / "ours", out)
    assert f"{tmp_path}/ours/unused.safetensors: damaged" in line
    shutil.copy(text / "ours" / "unused.safetensors", tmp_path / "ours")
    (tmp_path / "ours" / "hf_config.json").unlink()
    assert f"{tmp_path}/ours/hf_config.json: " in run(export, capsys, tmp_path / "ours", out)
    shutil.copy(text / "ours" / "hf_config.json", tmp_path / "ours")
    shutil.rmtree(tmp_path / "ours" / "params")
    line = run(export, capsys, tmp_path / "ours", out)
    assert f"{tmp_path}/ours/params: missing" in line
    assert [f.name for f in tmp_path.iterdir()] == ["ours"]


def test_interrupt_leaves_nothing(
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(from_hf, "write_unused", interrupted)
    with pytest.raises(SystemExit) as exit_:
        convert([str(text / "hf"), str(tmp_path / "out")])
    assert exit_.value.code == 130
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from e5v_jax.checkpoints import {module}
from e5v_jax.nn import parameters

parameters.GROUP = 1  # each layer by itself, as large ones are
real = {module}.{producer}

def dying(*args):
    for i, item in enumerate(real(*args)):
        if i == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        yield item

{module}.{producer} = dying
{module}.convert({module}.Args({source}(sys.argv[1]), Path(sys.argv[2])))
"""


@pytest.mark.parametrize(
    ("module", "producer", "source"),
    [("from_hf", "_read_groups", "str"), ("to_hf", "_tensors", "Path")],
)
def test_kill_leaves_no_output(
    text: Path, tmp_path: Path, module: str, producer: str, source: str
) -> None:
    """Killed with SIGKILL in mid-conversion; a second run works."""
    command = {"from_hf": from_hf, "to_hf": to_hf}[module]
    src, dst = text / ("hf" if module == "from_hf" else "ours"), tmp_path / "dst"
    code = KILLED.format(module=module, producer=producer, source=source)
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code, src, dst], env=env, cwd=root, check=False)
    assert done.returncode == -signal.SIGKILL
    (rest,) = tmp_path.iterdir()
    assert rest != dst and any(rest.rglob("*"))
    command.convert(command.Args(str(src) if module == "from_hf" else src, dst))
    if module == "from_hf":
        expected = ConvertedFolder(text / "ours").info.content_hash
        assert ConvertedFolder(dst).info.content_hash == expected
    else:
        whole = safetensors.numpy.load_file(dst / "model.safetensors")
        source_ = safetensors.numpy.load_file(text / "hf" / "model.safetensors")
        assert whole.keys() == source_.keys()
