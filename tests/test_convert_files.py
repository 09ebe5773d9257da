"""Bad values, tokenizers and folders, Hugging Face's or ours: one line that names them."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hf_models import build_tokenizer
from orbax.checkpoint import v1 as ocp
from refusals import DOWN, HEAD, Llava, make_text, refuse, run
from test_convert import save

from e5v_jax import E5V
from e5v_jax.checkpoints import from_hf, to_hf
from e5v_jax.checkpoints.commands import convert, export
from e5v_jax.checkpoints.converted import ConvertedFolder, write_params
from e5v_jax.checkpoints.hf_source import open_source


@pytest.fixture
def tensors(llava: Llava) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(llava("llama-gqa").folder / "model.safetensors")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text(tmp_path_factory.mktemp("text"))


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
