"""Encoding on several devices gives what one device gives."""

import json
import os
import subprocess
import sys
from pathlib import Path

from hf_models import Recipe, build_llava
from qwen2_models import OldRecipe, build_old
from qwen_models import QwenRecipe, build_qwen3_vl

TESTS = Path(__file__).parent


def test_every_mesh_gives_the_vectors_of_one_device(tmp_path: Path) -> None:
    """Data parallel, fsdp, tensor; texts, images and both; and splash attention on a mesh."""
    folders = [tmp_path / "llava", tmp_path / "qwen", tmp_path / "windows"]
    build_llava(Recipe(text={"vocab_size": 280}), folders[0])  # every axis divides by 4
    build_qwen3_vl(QwenRecipe(text={"vocab_size": 280}), folders[1])
    build_old(OldRecipe("qwen2_5_vl", text={"vocab_size": 280}), folders[2])
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    done = subprocess.run(
        [sys.executable, TESTS / "encode_on_meshes.py", *folders],
        env={**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(TESTS.parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == 2 * 2 + 1 + 1
    for result in results:
        assert result["difference"] <= (3e-6 if result["mesh"] == "splash" else 1e-6), result
