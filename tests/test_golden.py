"""The authors' printed figures: found by name, compared, and off when anything is."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from e5v_jax.cli import UsageError
from e5v_jax.evaluate import golden as module
from e5v_jax.evaluate.golden import GOLDENS, GoldenArgs, find_golden, golden

QWEN = next(iter(GOLDENS.values()))


class Authors:
    """A model whose vectors have the published cosines and first numbers."""

    def __init__(self, shift: float = 0.0) -> None:
        matrix = np.eye(len(QWEN.items))
        for (i, j), cosine in QWEN.cosines.items():
            matrix[i, j] = matrix[j, i] = cosine
        index, numbers = QWEN.vector or (0, ())
        # rows whose products are the matrix, then turned so that one begins as it was printed
        vectors = np.concatenate([np.linalg.cholesky(matrix), np.zeros((4, 60))], axis=1)
        rest = np.sqrt(1 - np.square(numbers).sum())
        target = np.concatenate([numbers, [rest], np.zeros(64 - len(numbers) - 1)])
        turn = vectors[index] - target
        turn /= np.linalg.norm(turn)
        self.vectors = vectors - 2 * np.outer(vectors @ turn, turn)
        self.vectors[0, :20] += shift
        self.asked: list[tuple[Any, str | None]] = []

    def encode_query(self, given: Any, *, instruction: str) -> np.ndarray:
        self.asked.append((given, instruction))
        return self.vectors[len(self.asked) - 1]

    def encode_document(self, given: Any) -> np.ndarray:
        self.asked.append((given, None))
        return self.vectors[len(self.asked) - 1]


def test_the_authors_figures(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Authors()
    monkeypatch.setattr(GoldenArgs, "load", lambda self: model)
    args = GoldenArgs(model="Qwen/Qwen3-VL-Embedding-2B", image=tmp_path / "demo.jpeg")
    golden(args)
    assert "all 19 figures are the authors'" in capsys.readouterr().out
    assert [instruction is not None for _, instruction in model.asked] == [True, *[False] * 3]
    assert model.asked[3][0]["image"] == tmp_path / "demo.jpeg"

    model = Authors(shift=0.02)
    with pytest.raises(ValueError, match=r"figures are off, cosine of inputs 1 and 2 first"):
        golden(args)
    assert "| off |" in capsys.readouterr().out

    model = Authors()
    model.vectors[:] = np.nan
    with pytest.raises(ValueError, match="19 of 19 figures are off"):
        golden(args)


def test_which_models_have_figures() -> None:
    assert find_golden("models/Qwen3-VL-Embedding-2B") is QWEN
    with pytest.raises(UsageError, match=r"--model: no figures were published for .*-8B, but for"):
        find_golden("Qwen/Qwen3-VL-Embedding-8B")


def test_a_photograph_that_cannot_be_had(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.jpg: .*; fetch it and give --image FILE"):
        module.fetch_image((tmp_path / "none.jpg").as_uri())
