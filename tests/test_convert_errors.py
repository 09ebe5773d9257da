"""Bad checkpoints: one line that names the file or key, and nothing left behind."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from refusals import DOWN, HEAD, Llava, add, cut, refuse, remove, run
from test_convert import save

from e5v_jax.atomic import new_folder
from e5v_jax.checkpoints import from_hf
from e5v_jax.checkpoints.commands import convert, export

LAST_BLOCK = "vision_tower.encoder.layers.2.mlp.fc1.bias"
SHARD = "model-00002-of-00003.safetensors"
INDEX = "model.safetensors.index.json"


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
        ({"model_type": "mllama", "architectures": ["MllamaModel"]}, "'MllamaModel'"),
        ({"model_type": None, "architectures": None}, "unsupported architecture None"),
        ({"text_config": {"model_type": "gemma2"}}, "'gemma2'"),
        ({"text_config": {"model_type": "nonesuch"}}, "nonesuch"),
        ({"vision_config": {"model_type": "siglip_vision_model"}}, "'siglip_vision_model'"),
        ({"vision_feature_select_strategy": "full"}, "'full'"),
        (
            {"text_config": {"model_type": "llama", "sliding_window": 4096}},
            "sliding_window is 4096",
        ),
        ({"text_config": {"model_type": "llama", "attention_bias": True}}, "attention_bias"),
        ({"text_config": {"model_type": "llama", "hidden_size": "wide"}}, "hidden_size"),
        *(
            ({"text_config": {"model_type": "llama", **text}}, expected)
            for text, expected in [
                (
                    {"num_hidden_layers": 0},
                    "num_hidden_layers is 0: expected a whole number from 1",
                ),
                ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
                ({"vocab_size": -1}, "vocab_size is -1"),
                ({"vocab_size": 10**12}, "vocab_size is 1000000000000"),
                ({"head_dim": 15}, "head_dim"),
                ({"num_key_value_heads": 3}, "num_attention_heads 32 is not a multiple of"),
                (
                    {"rms_norm_eps": float("nan")},
                    "rms_norm_eps is nan: expected a number from 0 to 1",
                ),
                ({"rms_norm_eps": -1e-5}, "rms_norm_eps is -1e-05"),
                *(
                    ({"rope_theta": x}, f"rope_theta is {x!r}: expected a number from 1 to")
                    for x in (0.0, -1e4, float("nan"), float("inf"), 1e30)
                ),
            ]
        ),
        *(
            ({"vision_config": {"model_type": "clip_vision_model", **x}}, expected)
            for x, expected in [
                (
                    {"patch_size": 0},
                    "vision_config.patch_size is 0: expected a whole number from 1",
                ),
                ({"num_channels": 1}, "vision_config.num_channels is 1: only 3 is supported"),
                (
                    {"image_size": 230},
                    "vision_config.image_size 230 is not a multiple of patch_size 32",
                ),
                ({"layer_norm_eps": -1.0}, "vision_config.layer_norm_eps is -1.0"),
                ({"num_hidden_layers": True}, "num_hidden_layers"),
            ]
        ),
        ({"vision_feature_layer": -4}, "vision_feature_layer is -4: expected 1 to 3, or -3 to -1"),
        ({"image_grid_pinpoints": [[28, 50]]}, "multiples of the tower's image_size 28"),
        ({"image_grid_pinpoints": []}, "image_grid_pinpoints is []"),
        ({"image_grid_pinpoints": [["28", 56]]}, "image_grid_pinpoints is [['28', 56]]"),
        ({"image_token_index": -5}, "image_token_id is -5"),
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


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", '"llama"', "\ufeff{}", "[" * 10**5, '{"a":' * 500 + "1" + "}" * 500]
)
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
    line = run(convert, capsys, source, tmp_path / "dst")
    assert f"{tmp_path / 'dst'}: already exists" in line
    line = run(convert, capsys, source, tmp_path / "dst" / "mine")  # a file
    assert f"{tmp_path / 'dst' / 'mine'}: already exists" in line
    assert [f.read_text() for f in (tmp_path / "dst").iterdir()] == ["precious"]
    assert sorted(f.name for f in tmp_path.iterdir()) == ["dst"]
    (tmp_path / "empty").mkdir()  # is as good as none
    from_hf.convert(from_hf.Args(str(source), tmp_path / "empty"))
    capsys.readouterr()
    line = run(export, capsys, tmp_path / "empty", tmp_path / "dst")
    assert f"{tmp_path / 'dst'}: already exists" in line


def test_of_two_at_once_one_is_told(tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match="dst: already exists"), new_folder(tmp_path / "dst"):
        (tmp_path / "dst" / "params").mkdir(parents=True)  # the other was faster
    assert [f.name for f in tmp_path.iterdir()] == ["dst"]
