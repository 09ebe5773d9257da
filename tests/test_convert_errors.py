"""Bad input to the converters: one line that names the file or key, and nothing left behind."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hf_models import TEXT_RECIPES, Case, build_text
from test_convert import save
from test_to_hf import random_adapter

from e5v_jax import cli
from e5v_jax.checkpoints import from_hf, to_hf
from e5v_jax.checkpoints.converted import ConvertedFolder
from e5v_jax.checkpoints.peft import write_adapter

Llava = Callable[[str], Case]
DOWN = "language_model.model.layers.1.mlp.down_proj.weight"
HEAD = "language_model.lm_head.weight"
LAST_BLOCK = "vision_tower.encoder.layers.2.mlp.fc1.bias"
SHARD = "model-00002-of-00003.safetensors"
INDEX = "model.safetensors.index.json"


def run(command: Any, capsys: pytest.CaptureFixture[str], *argv: str | Path, code: int = 1) -> str:
    """The one line that a command which must fail prints."""
    with pytest.raises(SystemExit) as exit_:
        cli.run(command.convert, command.Args, argv=[str(word) for word in argv])
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
    line = run(from_hf, capsys, src, out / "ours", *flags)
    assert list(out.iterdir()) == []
    return line


@pytest.fixture
def tensors(llava: Llava) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(llava("llama-gqa").folder / "model.safetensors")


@pytest.fixture
def sharded(llava: Llava, tensors: dict[str, np.ndarray], tmp_path: Path) -> Path:
    """A good checkpoint of three shards, to be damaged."""
    folder = tmp_path / "src"
    save(tensors, folder, sharded=True)
    shutil.copy(llava("llama-gqa").folder / "config.json", folder)
    return folder


@pytest.mark.parametrize("size", [0, 5, 100, -1], ids=["empty", "no-header", "in-header", "data"])
def test_truncated_shard(
    sharded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], size: int
) -> None:
    data = (sharded / SHARD).read_bytes()
    (sharded / SHARD).write_bytes(data[:size])
    line = refuse(sharded, tmp_path / "out", capsys)
    assert f"{sharded / SHARD}: damaged or truncated" in line and "fetch it again" in line


def test_missing_shard(sharded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (sharded / SHARD).unlink()
    assert f"{sharded / SHARD}: missing" in refuse(sharded, tmp_path / "out", capsys)


@pytest.mark.parametrize("where", ["nowhere", "another file"])
def test_index_names_a_key_that_is_not_in_the_file(
    sharded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], where: str
) -> None:
    index = json.loads((sharded / INDEX).read_text())
    key = "model.extra"
    if where == "another file":
        key = next(key for key, name in index["weight_map"].items() if name != SHARD)
    index["weight_map"][key] = SHARD
    (sharded / INDEX).write_text(json.dumps(index))
    line = refuse(sharded, tmp_path / "out", capsys)
    assert f"{sharded / SHARD}: {key} is not in this file" in line


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_broken_index(
    sharded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    (sharded / INDEX).write_text(text)
    assert f"{sharded / INDEX}: damaged" in refuse(sharded, tmp_path / "out", capsys)


def test_key_in_two_shards(
    sharded: Path,
    tensors: dict[str, np.ndarray],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shard = safetensors.numpy.load_file(sharded / SHARD)
    assert DOWN in shard
    first = sharded / SHARD.replace("2-of", "1-of")
    more = {**safetensors.numpy.load_file(first), DOWN: tensors[DOWN]}
    safetensors.numpy.save_file(more, first)
    line = refuse(sharded, tmp_path / "out", capsys)
    assert f"{sharded / SHARD}: {DOWN} is in {first.name} too" in line


def remove(tensors: dict[str, np.ndarray], key: str) -> None:
    del tensors[key]


def add(tensors: dict[str, np.ndarray], key: str) -> None:
    tensors[key] = np.zeros((2, 3), np.float32)


def cut(tensors: dict[str, np.ndarray], key: str) -> None:
    tensors[key] = np.ascontiguousarray(tensors[key][:-1])


def transpose(tensors: dict[str, np.ndarray], key: str) -> None:
    tensors[key] = np.ascontiguousarray(tensors[key].T)


def integers(tensors: dict[str, np.ndarray], key: str) -> None:
    tensors[key] = tensors[key].astype(np.int8)


BLOCK_3 = LAST_BLOCK.replace("layers.2.", "layers.3.")
LAYER_3 = DOWN.replace("layers.1.", "layers.3.")
CASES = {
    "a decoder key too few": (remove, DOWN, "missing"),
    "no embedding": (remove, "language_model.model.embed_tokens.weight", "no embed_tokens.weight"),
    "a projector key too few": (remove, "multi_modal_projector.linear_2.bias", "missing"),
    "no newline": (remove, "image_newline", "missing"),
    "no class embedding": (remove, "vision_tower.embeddings.class_embedding", "unknown key"),
    "a bias that Llama has not": (add, DOWN.replace("weight", "bias"), "unknown key"),
    "a module that nobody knows": (add, "language_model.model.layers.0.router.weight", "unknown"),
    "a decoder layer too many": (add, LAYER_3, "one too many"),
    "a vision block too many": (add, BLOCK_3, "one too many"),
    "two heads": (add, "lm_head.weight", "holds the same parameter as"),
    "a short matrix": (cut, DOWN, "shape [63, 96], the configuration asks for [64, 96]"),
    "a transposed matrix": (transpose, DOWN, "shape [96, 64]"),
    "a short embedding": (cut, "language_model.model.embed_tokens.weight", "shape [276, 64]"),
    "a short norm": (cut, "language_model.model.norm.weight", "shape [63]"),
    "a short patch embedding": (
        cut,
        "vision_tower.embeddings.patch_embedding.weight",
        "shape [47, 3, 7, 7]",
    ),
    "a short head": (cut, HEAD, "shape [276, 64]"),
    "a short block kept for export": (cut, LAST_BLOCK, "shape [79]"),
    "quantised": (integers, DOWN, "dtype I8"),
    "a quantised head": (integers, HEAD, "dtype I8"),
}


@pytest.mark.parametrize("name", CASES)
def test_keys_and_shapes(
    llava: Llava,
    tensors: dict[str, np.ndarray],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    change, key, expected = CASES[name]
    change(tensors, key)
    save(tensors, tmp_path / "src", sharded=False)
    shutil.copy(llava("llama-gqa").folder / "config.json", tmp_path / "src")
    line = refuse(tmp_path / "src", tmp_path / "out", capsys)
    assert str(tmp_path / "src") in line and expected in line
    if expected != "no embed_tokens.weight" and name != "no class embedding":
        assert key in line


def test_text_model_with_vision_keys(
    llava: Llava, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(llava("llama-gqa").folder, tmp_path / "src")
    config = json.loads((tmp_path / "src" / "config.json").read_text())
    (tmp_path / "src" / "config.json").write_text(json.dumps(config["text_config"]))
    line = refuse(tmp_path / "src", tmp_path / "out", capsys)
    assert "image_newline: one too many" in line


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"model_type": "qwen2_vl", "architectures": ["Qwen2VLModel"]}, "'Qwen2VLModel'"),
        ({"model_type": None, "architectures": None}, "unsupported architecture None"),
        ({"text_config": {"model_type": "gemma2"}}, "'gemma2'"),
        ({"text_config": {"model_type": "nonesuch"}}, "nonesuch"),
        ({"vision_config": {"model_type": "siglip_vision_model"}}, "'siglip_vision_model'"),
        ({"vision_feature_select_strategy": "full"}, "'full'"),
        (
            {"text_config": {"model_type": "mistral", "sliding_window": 4096}},
            "sliding_window is 4096",
        ),
        ({"text_config": {"model_type": "llama", "attention_bias": True}}, "attention_bias"),
        ({"text_config": {"model_type": "llama", "hidden_size": "wide"}}, "hidden_size"),
        (
            {
                "text_config": {
                    "model_type": "llama",
                    "rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0},
                }
            },
            "",
        ),
    ],
)
def test_unsupported_config(
    llava: Llava,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, Any],
    expected: str,
) -> None:
    shutil.copytree(llava("llama-gqa").folder, tmp_path / "src")
    file = tmp_path / "src" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    line = refuse(tmp_path / "src", tmp_path / "out", capsys)
    assert str(file) in line and expected in line
    assert len(line) < 600


@pytest.mark.parametrize("text", ["", "{", "[1]", '"llama"', "\ufeff{}"])
def test_broken_config(
    llava: Llava, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    shutil.copytree(llava("llama-gqa").folder, tmp_path / "src")
    (tmp_path / "src" / "config.json").write_text(text)
    assert f"{tmp_path}/src/config.json: " in refuse(tmp_path / "src", tmp_path / "out", capsys)


def test_folders_without_weights(
    llava: Llava, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "nothere: no such folder" in refuse(tmp_path / "nothere", tmp_path / "a", capsys)
    src = tmp_path / "src"
    src.mkdir()
    assert f"{src}/config.json: missing" in refuse(src, tmp_path / "b", capsys)
    shutil.copy(llava("llama-gqa").folder / "config.json", src)
    assert f"{src}: no *.safetensors" in refuse(src, tmp_path / "c", capsys)
    (src / "pytorch_model-00001-of-00002.bin").write_bytes(b"")
    line = refuse(src, tmp_path / "d", capsys)
    assert f"{src}: only pickled .bin weights" in line and "save_pretrained" in line


def test_output_that_exists(
    llava: Llava, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = llava("llama-gqa").folder
    (tmp_path / "dst").mkdir()
    (tmp_path / "dst" / "mine").write_text("precious")
    line = run(from_hf, capsys, source, tmp_path / "dst")
    assert f"{tmp_path / 'dst'}: already exists" in line
    line = run(from_hf, capsys, source, tmp_path / "dst" / "mine")  # a file
    assert f"{tmp_path / 'dst' / 'mine'}: already exists" in line
    assert [f.read_text() for f in (tmp_path / "dst").iterdir()] == ["precious"]
    assert sorted(f.name for f in tmp_path.iterdir()) == ["dst"]
    (tmp_path / "empty").mkdir()  # is as good as none
    from_hf.convert(from_hf.Args(str(source), tmp_path / "empty"))
    capsys.readouterr()
    line = run(to_hf, capsys, tmp_path / "empty", tmp_path / "dst")
    assert f"{tmp_path / 'dst'}: already exists" in line


# Adapters ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small text model, converted, and its Hugging Face folder beside it."""
    folder = tmp_path_factory.mktemp("text")
    case = build_text(TEXT_RECIPES["llama"], folder / "hf")
    from_hf.convert(from_hf.Args(str(case.folder), folder / "ours"))
    table = ConvertedFolder(folder / "ours").table
    write_adapter(folder / "adapter", random_adapter(folder / "ours"), table)
    return folder


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


KEYS = {
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
    for command, src in ((from_hf, "hf"), (to_hf, "ours")):
        line = run(command, capsys, text / src, tmp_path / "x", "--adapter", tmp_path / "adapter")
        assert f"{file}: " in line and expected in line
        assert name == "no partner" or key in line
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
    assert f"{adapter}/adapter_config.json: not a PEFT LoRA config" in line
    line = run(from_hf, capsys, src, tmp_path / "e", "--merge", code=2)
    assert "--merge" in line and "--adapter" in line


# Export --------------------------------------------------------------------------------------


def test_export_errors(
    llava: Llava, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    line = run(to_hf, capsys, text / "hf", out)
    assert f"{text / 'hf'}: not a converted folder" in line
    assert "already a converted folder" in run(from_hf, capsys, text / "ours", out)
    assert "nothere" in run(to_hf, capsys, tmp_path / "nothere", out)
    assert "carries no adapter" in run(to_hf, capsys, text / "ours", out, "--merge", code=2)
    assert "carries no adapter" in run(to_hf, capsys, text / "ours", out, "--peft", code=2)
    line = run(to_hf, capsys, text / "ours", out, "--merge", "--peft", code=2)
    assert "--merge, --peft" in line
    line = run(to_hf, capsys, text / "ours", out, "--adapter", tmp_path)
    assert f"{tmp_path}: neither a PEFT adapter" in line
    shutil.copytree(text / "ours", tmp_path / "ours")
    (tmp_path / "ours" / "unused.safetensors").write_bytes(b"12345678")
    line = run(to_hf, capsys, tmp_path / "ours", out)
    assert f"{tmp_path}/ours/unused.safetensors: damaged" in line
    shutil.copy(text / "ours" / "unused.safetensors", tmp_path / "ours")
    (tmp_path / "ours" / "hf_config.json").unlink()
    assert f"{tmp_path}/ours/hf_config.json: " in run(to_hf, capsys, tmp_path / "ours", out)
    shutil.copy(text / "ours" / "hf_config.json", tmp_path / "ours")
    shutil.rmtree(tmp_path / "ours" / "params")
    line = run(to_hf, capsys, tmp_path / "ours", out)
    assert f"{tmp_path}/ours/params: cannot read 'language_model." in line
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
        argv = [str(text / "hf"), str(tmp_path / "out")]
        cli.run(from_hf.convert, from_hf.Args, argv=argv)
    assert exit_.value.code == 130
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from e5v_jax.checkpoints import {module}

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
