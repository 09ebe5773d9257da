"""Bad adapters: one line that names the file, option or key, and nothing left behind."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from refusals import add, cut, make_text, refuse, remove, run

from e5v_jax.checkpoints.commands import convert, export


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text(tmp_path_factory.mktemp("text"))


ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"use_dora": True}, "use_dora True"),
    ({"peft_type": "IA3"}, "peft_type 'IA3'"),
    ({"bias": "lora_only"}, "bias 'lora_only'"),
    ({"lora_bias": True}, "lora_bias True"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save ['lm_head']"),
    ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),
    ({"r": None}, "adapter_config.json"),
    ({"r": 4}, "shape [3, 96], expected [4, 96]"),
    ({"r": 10**9}, "shape [3, 96], expected [1000000000, 96]"),  # nothing is allocated
    ({"r": 0}, "r is 0: expected a whole number from 1"),
    ({"r": True}, "r is True"),
    ({"r": 3.0}, "r is 3.0"),
    ({"r": "3"}, "r is '3'"),
    ({"lora_alpha": float("nan")}, "lora_alpha is nan: expected a number"),
    ({"lora_alpha": 1e30}, "lora_alpha is 1e+30"),
    ({"lora_alpha": "16"}, "lora_alpha is '16'"),
    ({"lora_dropout": 1.5}, "lora_dropout is 1.5: expected a number, 0 to 1"),
    ({"target_modules": None}, "no 'target_modules'"),
    ({"target_modules": ["q_proj"]}, "self_attn.k_proj has factors, but is not among the modules"),
    ({"exclude_modules": ["q_proj"]}, "self_attn.q_proj has factors, but is not among"),
    (
        {"target_modules": ALL, "layers_to_transform": [0, 1]},
        "layers.2.self_attn.q_proj has factors, but is not among the modules",
    ),
    ({"layers_pattern": "h"}, "need a list of modules"),
    ({"target_modules": "("}, "a pattern cannot be read"),
    ({"frobnicate": 1}, "frobnicate is 1: this option is not known"),
]


@pytest.mark.parametrize(("change", "expected"), OPTIONS, ids=[e for _, e in OPTIONS])
def test_adapter_options(
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, Any],
    expected: str,
) -> None:
    shutil.copytree(text / "adapter", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    line = refuse(text / "hf", tmp_path / "out", capsys, "--adapter", tmp_path / "adapter")
    assert str(tmp_path / "adapter") in line and expected in line


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def repeat(tensors: dict[str, np.ndarray], key: str) -> None:
    tensors[key.replace("model.model.model.", "model.model.")] = tensors[key]


def lose(tensors: dict[str, np.ndarray], module: str) -> None:
    del tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"]


def move(tensors: dict[str, np.ndarray], key: str) -> None:
    for old in sorted(tensors):
        tensors[old.replace("model.model.", "model.language_model.")] = tensors.pop(old)


def not_a_number(tensors: dict[str, np.ndarray], key: str) -> None:
    tensors[key][0, 1] = np.nan


KEYS = {
    "a zero before the layer": (add, Q.replace("layers.0", "layers.00"), "only LoRA on the"),
    "of a LLaVA model": (move, Q, "such as base_model.model.model.layers.0."),
    "not a number": (not_a_number, Q, "1 of 192 values are NaN or infinite, the first at [0, 1]"),
    "a module that is targeted": (lose, Q.replace(".lora_A.weight", ""), "the file is not whole"),
    "unknown module": (add, Q.replace("q_proj", "qkv_proj"), "only LoRA on the decoder's"),
    "wrong parent": (add, Q.replace("self_attn", "mlp"), "only LoRA on the decoder's"),
    "vision tower": (add, Q.replace(".model.layers", ".vision_tower.layers"), "only LoRA"),
    "embedding": (add, "base_model.model.lm_head.lora_A.weight", "only LoRA on the decoder's"),
    "layer too many": (add, Q.replace("layers.0", "layers.3"), "the model has only 3 layers"),
    "no partner": (remove, Q, "layer 0 q_proj has lora_B but not its partner"),
    "wrong shape": (cut, Q, "shape [2, 64], expected [3, 64]"),
    "twice": (repeat, Q, "comes twice, under two prefixes"),
}


@pytest.mark.parametrize("name", KEYS)
def test_adapter_keys(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    change, key, expected = KEYS[name]
    shutil.copytree(text / "adapter", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    change(tensors, key)
    safetensors.numpy.save_file(tensors, file)
    for command, src in ((convert, "hf"), (export, "ours")):
        line = run(command, capsys, text / src, tmp_path / "x", "--adapter", tmp_path / "adapter")
        assert f"{file}: " in line and expected in line
        assert name in ("no partner", "of a LLaVA model") or key in line
    assert [f.name for f in tmp_path.iterdir()] == ["adapter"]


def test_adapter_files(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    src, adapter = text / "hf", tmp_path / "adapter"
    flags = ("--adapter", adapter)
    assert f"{adapter}/adapter_config.json: missing" in refuse(src, tmp_path / "a", capsys, *flags)
    shutil.copytree(text / "adapter", adapter)
    file = adapter / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    line = refuse(src, tmp_path / "b", capsys, *flags)
    assert f"{file}: damaged or truncated" in line
    file.rename(adapter / "adapter_model.bin")
    line = refuse(src, tmp_path / "c", capsys, *flags)
    assert f"{file}: missing" in line and "safetensors" in line
    file.write_bytes(whole)
    (adapter / "adapter_config.json").write_text("{")
    line = refuse(src, tmp_path / "d", capsys, *flags)
    assert f"{adapter}/adapter_config.json: damaged, not JSON" in line
    line = run(convert, capsys, src, tmp_path / "e", "--merge", code=2)
    assert "--merge" in line and "--adapter" in line
