"""What the tests of bad checkpoints share: one line is told, and nothing left behind."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hf_models import TEXT_RECIPES, Case, build_text
from test_to_hf import random_adapter

from e5v_jax.checkpoints import from_hf
from e5v_jax.checkpoints.commands import convert
from e5v_jax.checkpoints.converted import ConvertedFolder
from e5v_jax.checkpoints.peft import write_adapter

Llava = Callable[[str], Case]
DOWN = "language_model.model.layers.1.mlp.down_proj.weight"
HEAD = "language_model.lm_head.weight"


def run(command: Any, capsys: pytest.CaptureFixture[str], *argv: str | Path, code: int = 1) -> str:
    """The one line that a command which must fail prints."""
    with pytest.raises(SystemExit) as exit_:
        command([str(word) for word in argv])
    captured = capsys.readouterr()
    assert exit_.value.code == code, captured.err
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), captured.err
    assert "Traceback" not in captured.err
    return lines[0]


def refuse(
    src: Path | str, out: Path, capsys: pytest.CaptureFixture[str], *flags: str | Path
) -> str:
    """:func:`run` for ``convert.from_hf SRC OUT/ours``."""
    out.mkdir()
    line = run(convert, capsys, src, out / "ours", *flags)
    assert list(out.iterdir()) == []
    return line


def remove(tensors: dict[str, np.ndarray], key: str) -> None:
    del tensors[key]


def add(tensors: dict[str, np.ndarray], key: str) -> None:
    tensors[key] = np.zeros((2, 3), np.float32)


def cut(tensors: dict[str, np.ndarray], key: str) -> None:
    tensors[key] = np.ascontiguousarray(tensors[key][:-1])


def make_text(folder: Path) -> Path:
    """A small text model, converted, its Hugging Face folder and an adapter beside it."""
    case = build_text(TEXT_RECIPES["llama"], folder / "hf")
    from_hf.convert(from_hf.Args(str(case.folder), folder / "ours"))
    table = ConvertedFolder(folder / "ours").table
    write_adapter(folder / "adapter", random_adapter(folder / "ours"), table)
    return folder
