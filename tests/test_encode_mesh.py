"""Encoding on several devices gives what one device gives."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hf_models import Recipe, build_llava
from qwen2_models import OldRecipe, build_old
from qwen_models import QwenRecipe, build_qwen3_vl

TESTS = Path(__file__).parent


def build_llava_next(folder: Path) -> None:
    build_llava(Recipe(text={"vocab_size": 280}), folder)  # every axis divides by 4


def build_qwen3(folder: Path) -> None:
    build_qwen3_vl(QwenRecipe(text={"vocab_size": 280}), folder)


def build_windows(folder: Path) -> None:
    build_old(OldRecipe("qwen2_5_vl", text={"vocab_size": 280}), folder)


@pytest.mark.parametrize(
    ("builders", "lines"),
    [
        pytest.param((build_llava_next,), 3, id="llava_next"),
        pytest.param(
            (build_llava_next, build_qwen3, build_windows), 6, id="all", marks=pytest.mark.slow
        ),
    ],
)
def test_every_mesh_gives_the_vectors_of_one_device(
    builders: tuple[Callable[[Path], None], ...], lines: int, tmp_path: Path
) -> None:
    """Data parallel, fsdp, tensor; texts, images and both; and splash attention on a mesh."""
    folders = [tmp_path / name for name in ("llava", "qwen", "windows")[: len(builders)]]
    for build, folder in zip(builders, folders, strict=True):
        build(folder)
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    done = subprocess.run(
        [sys.executable, TESTS / "encode_on_meshes.py", *folders],
        env={**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(TESTS.parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == lines
    for result in results:
        assert result["difference"] <= (3e-6 if result["mesh"] == "splash" else 1e-6), result
