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
from faults import file_size_limit
from hf_models import TEXT_RECIPES, Case, build_text, build_tokenizer
from orbax.checkpoint import v1 as ocp
from test_convert import save
from test_to_hf import random_adapter

from e5v_jax import E5V
from e5v_jax.atomic import new_folder
from e5v_jax.checkpoints import from_hf, to_hf
from e5v_jax.checkpoints.commands import convert, export
from e5v_jax.checkpoints.converted import ConvertedFolder, write_params
from e5v_jax.checkpoints.hf_source import open_source
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


def test_a_full_disk_is_one_line(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A limit of the size of files stands for it; no file of the arrays fits in."""
    (tmp_path / "out").mkdir()
    with file_size_limit(16_000):
        line = run(convert, capsys, text / "hf", tmp_path / "out" / "ours")
    assert line.startswith(f"error: {tmp_path / 'out' / 'ours'}: File too large: free some space")
    assert not list((tmp_path / "out").iterdir())


def test_of_two_at_once_one_is_told(tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match="dst: already exists"), new_folder(tmp_path / "dst"):
        (tmp_path / "dst" / "params").mkdir(parents=True)  # the other was faster
    assert [f.name for f in tmp_path.iterdir()] == ["dst"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small text model, converted, and its Hugging Face folder beside it."""
    folder = tmp_path_factory.mktemp("text")
    case = build_text(TEXT_RECIPES["llama"], folder / "hf")
    from_hf.convert(from_hf.Args(str(case.folder), folder / "ours"))
    table = ConvertedFolder(folder / "ours").table
    write_adapter(folder / "adapter", random_adapter(folder / "ours"), table)
    return folder


# Values, tokenizers, other files -------------------------------------------------------------


def put(value: float) -> Callable[[dict[str, np.ndarray], str], None]:
    def change(tensors: dict[str, np.ndarray], key: str) -> None:
        tensors[key][(1,) * tensors[key].ndim] = value

    return change


@pytest.mark.parametrize("dtype", ["auto", "float16"])
@pytest.mark.parametrize("key", [DOWN, HEAD, "multi_modal_projector.linear_1.bias"])
@pytest.mark.parametrize("value", [np.nan, -np.inf, 7e4])
def test_values_that_are_no_numbers(
    llava: Llava,
    tensors: dict[str, np.ndarray],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    value: float,
    key: str,
    dtype: str,
) -> None:
    """NaN and infinity, also in what is kept for export; 70000 is one in float16."""
    put(value)(tensors, key)
    save(tensors, tmp_path / "src", sharded=False)
    for file in llava("llama-gqa").folder.glob("*.json"):
        shutil.copy(file, tmp_path / "src")
    if value == 7e4 and dtype == "auto":
        from_hf.convert(from_hf.Args(str(tmp_path / "src"), tmp_path / "ours"))
        capsys.readouterr()
        if key == DOWN:
            line = run(export, capsys, tmp_path / "src", tmp_path / "x")
            with pytest.raises(
                ValueError, match=r"down_proj.kernel: 7e\+04 is too large for float16"
            ):
                E5V.from_pretrained(tmp_path / "ours", dtype="float16")
            with pytest.raises(
                ValueError, match=r"down_proj.kernel: 7e\+04 is too large for float16"
            ):
                E5V.from_pretrained(tmp_path / "src", dtype="float16")
        return
    line = refuse(tmp_path / "src", tmp_path / "out", capsys, "--dtype", dtype)
    if value == 7e4:
        assert ": 7e+04 is too large for float16: choose bfloat16 or float32" in line
    else:
        assert f"{tmp_path / 'src'}: {key}: 1 of {tensors[key].size} values are NaN" in line
        with pytest.raises(ValueError, match="values are NaN or infinite, the first at "):
            list(open_source(tmp_path / "src").read_key(key))


def test_nan_in_a_converted_folder(text: Path, tmp_path: Path) -> None:
    """What no conversion writes any more may be there all the same."""
    source = ConvertedFolder(text / "ours")
    arrays = dict(zip(source.shapes(), source.read(list(source.shapes())), strict=True))
    name = "language_model.layers.1.mlp.down_proj.kernel"
    arrays[name] = arrays[name].copy()
    arrays[name][3, 4] = np.inf
    shutil.copytree(text / "ours", tmp_path / "ours", ignore=shutil.ignore_patterns("params"))
    write_params(tmp_path / "ours", [arrays])
    with pytest.raises(ValueError, match=rf"ours/params: {name}: 1 of 6144 values .* \[3, 4\]"):
        E5V.from_pretrained(tmp_path / "ours")


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("tokenizer.json", None, "no tokenizer.json or tokenizer.model"),
        ("tokenizer.json", "", "tokenizer.json: damaged"),
        ("tokenizer.json", "{}", "tokenizer.json: damaged"),
        ("tokenizer.json", 3000, "tokenizer.json: damaged"),
        ("tokenizer_config.json", "[1]", "tokenizer_config.json: damaged, expected a JSON object"),
        ("special_tokens_map.json", "{", "special_tokens_map.json: damaged, not JSON"),
        ("tokenizer_config.json", None, "the tokenizer adds ['<s>'] before the prompt, expected"),
    ],
)
def test_broken_tokenizers(
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    file: str,
    content: str | int | None,
    expected: str,
) -> None:
    """At conversion, before the weights are read, and not at the first text."""
    shutil.copytree(text / "hf", tmp_path / "src")
    if isinstance(content, int):
        content = (tmp_path / "src" / file).read_text()[:content]
    if content is None:
        (tmp_path / "src" / file).unlink()
    else:
        (tmp_path / "src" / file).write_text(content)
    line = refuse(tmp_path / "src", tmp_path / "out", capsys)
    assert f"{tmp_path / 'src'}" in line and expected in line


def test_what_the_libraries_take_for_damage(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder's name, and a file that may not be read, are told as what they are."""
    odd = tmp_path / os.fsdecode(b"mod\xe9l")
    shutil.copytree(text / "hf", odd)
    assert "the folder's name is not UTF-8: rename it" in refuse(odd, tmp_path / "out", capsys)

    opened = Path.open

    def deny(path: Path, *args: Any, **options: Any) -> Any:
        if path.name == "model.safetensors":
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *args, **options)

    monkeypatch.setattr(Path, "open", deny)  # root may read everything
    line = refuse(text / "hf", tmp_path / "other", capsys)
    assert line.endswith("model.safetensors: Permission denied")


def test_a_token_without_a_row(text: Path, tmp_path: Path) -> None:
    """On a device it would be the last row's vector, without a word."""
    shutil.copytree(text / "hf", tmp_path / "src")
    tokenizer = build_tokenizer("chatml")
    tokenizer.add_tokens(["zebra"])
    tokenizer.save_pretrained(tmp_path / "src")
    model = E5V.from_pretrained(tmp_path / "src", dtype="float32")
    with pytest.raises(ValueError, match=r"token 'zebra' has id 261, but .* table has 261 rows"):
        model.encode(["a dog", "a zebra"])


def test_pipes_and_brackets(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A pipe is never opened, which would wait for ever; brackets are no pattern."""
    os.mkfifo(tmp_path / "pipe")
    for command in (convert, export):
        line = run(command, capsys, tmp_path / "pipe", tmp_path / "x")
        assert f"{tmp_path / 'pipe'}: expected a folder" in line
    shutil.copytree(text / "hf", tmp_path / "src")
    for name in ("config.json", "tokenizer_config.json", "model.safetensors"):
        (tmp_path / "src" / name).rename(tmp_path / "kept")
        os.mkfifo(tmp_path / "src" / name)
        line = run(convert, capsys, tmp_path / "src", tmp_path / "x")
        assert str(tmp_path / "src") in line
        (tmp_path / "kept").rename(tmp_path / "src" / name)
    odd = tmp_path / "a[0-9]*?b"
    from_hf.convert(from_hf.Args(str(text / "hf"), odd / "ours"))
    to_hf.convert(to_hf.Args(odd / "ours", odd / "back"))
    expected = (text / "hf" / "model.safetensors").read_bytes()
    found = safetensors.numpy.load_file(odd / "back" / "model.safetensors")
    for key, array in safetensors.numpy.load(expected).items():
        np.testing.assert_array_equal(found[key], array)


# Converted folders ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"model_type": "gpt9"}, "model_type is 'gpt9', not one of llama, mistral"),
        ({"model": 3}, "model is 3"),
        ({"dtype": "float8"}, "dtype is 'float8', not one of"),
        ({"dtype": ...}, "has no 'dtype'"),
        ({"more": 1}, "has 'more', which is not known"),
        ({"format_version": 99}, "format_version 99, this version reads 1 and 2"),
        ({"parameters": {}}, "parameters: language_model.embed_tokens is None, expected [261, 64]"),
        ({"model": {"text": {"vocab_size": 1}}}, "model.text has no 'hidden_size'"),
        ({"source": 3}, "source is 3"),
    ],
)
def test_converted_config(text: Path, tmp_path: Path, change: Any, expected: str) -> None:
    shutil.copytree(text / "ours", tmp_path / "ours")
    file = tmp_path / "ours" / "config.json"
    content = {**json.loads(file.read_text()), **change}
    file.write_text(json.dumps({key: x for key, x in content.items() if x is not ...}))
    with pytest.raises(ValueError) as error:
        ConvertedFolder(tmp_path / "ours")
    assert str(error.value).startswith(f"{file}: ") and expected in str(error.value)
    assert str(error.value).endswith("; convert the model again")


def test_what_to_do_about_params(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Converting again is for what is damaged; Orbax's advice to programmers is for nobody."""

    def read(folder: Path) -> str:
        with pytest.raises((ValueError, OSError)) as error:
            list(ConvertedFolder(folder).read(["language_model.norm.scale"]))
        line = str(error.value)
        assert line.startswith(f"{folder}/params: ") and "\n" not in line and len(line) < 300
        assert "layout" not in line and "resolution" not in line
        return line

    shutil.copytree(text / "ours", tmp_path / "cut")
    for file in (tmp_path / "cut" / "params" / "state").rglob("d/*"):
        file.write_bytes(file.read_bytes()[:9])
    line = read(tmp_path / "cut")
    assert "norm.scale: damaged (" in line and line.endswith("; convert the model again")
    shutil.copytree(text / "ours", tmp_path / "part")
    shutil.rmtree(tmp_path / "part" / "params" / "state")
    assert "damaged (a file that says what is there is missing)" in read(tmp_path / "part")
    shutil.rmtree(tmp_path / "part" / "params")
    assert "missing; convert the model again, or copy it there" in read(tmp_path / "part")
    causes = {  # as TensorStore and Orbax say it of files of another user, and of a bucket
        'PERMISSION_DENIED: Error reading "language_model.norm.scale/zarr.json": file "x"': "ask",
        'UNAVAILABLE: Error reading "language_model.norm.scale/c/0": 503': "try again",
    }
    for text_, todo in causes.items():
        with monkeypatch.context() as patch:
            patch.setattr(ocp, "load", raising(ValueError(text_)))
            line = read(text / "ours")
            assert todo in line and "convert" not in line
    with monkeypatch.context() as patch:
        patch.setattr(ocp, "load", raising(OSError(5, "Input/output error")))
        assert "Input/output error" in read(text / "ours")


def raising(error: Exception) -> Callable[..., None]:
    def fail(*_: Any) -> None:
        raise error

    return fail


# Adapters ------------------------------------------------------------------------------------


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


# Export --------------------------------------------------------------------------------------


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
