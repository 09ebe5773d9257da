"""The embedding cache: what is there is not embedded again, and what differs is not mixed up."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import pytest
from PIL import Image

import e5v_jax
from e5v_jax.checkpoints.model_key import model_key
from e5v_jax.evaluate.cached_encoder import CachedEncoder, VectorCache, input_key
from e5v_jax.evaluate.command import evaluate
from e5v_jax.evaluate.config import EvaluateConfig
from e5v_jax.presets import E5_V

if TYPE_CHECKING:
    from hf_models import Case

PROMPT = "<sent>: "


class Counting:
    """Counts what it is asked to embed."""

    template = "llama3"
    preset = E5_V
    encoded: list[Any]

    def __init__(self) -> None:
        self.encoded = []

    def encode(self, inputs: list[Any], *, prompt: str, **_: Any) -> np.ndarray:
        self.encoded += inputs
        seeds = [list(input_key(item)) + list(prompt.encode()) for item in inputs]
        return np.array([np.random.default_rng(s).normal(size=5) for s in seeds], np.float32)


def embed(texts: list[str], cache: Path | None, prompt: str = PROMPT, **about: str) -> Any:
    model = Counting()
    embedder = CachedEncoder(model, batch_size=4, cache=cache, about=about)  # type: ignore[arg-type]
    vectors = embedder.embed(texts, prompt=prompt, make=str, where=str)
    return vectors, model.encoded


def test_only_what_is_new_is_embedded(tmp_path: Path) -> None:
    first, encoded = embed(["a", "b", "a", "c"], tmp_path)
    assert encoded == ["a", "b", "c"]  # each distinct one once
    again, encoded = embed(["c", "a", "b", "a"], tmp_path)
    assert encoded == []
    np.testing.assert_array_equal(again, first[[3, 0, 1, 0]])  # to the bit
    more, encoded = embed(["d", "a"], tmp_path)
    assert encoded == ["d"]
    np.testing.assert_array_equal(more[1], first[0])
    without, encoded = embed(["a", "b", "a", "c"], None)
    assert encoded == ["a", "b", "c"]
    np.testing.assert_array_equal(without, first)


def test_another_model_or_prompt_shares_nothing(tmp_path: Path) -> None:
    embed(["a"], tmp_path, model="x")
    assert embed(["a"], tmp_path, model="x")[1] == []
    assert embed(["a"], tmp_path, model="y")[1] == ["a"]
    assert embed(["a"], tmp_path, model="x", dtype="float32")[1] == ["a"]
    assert embed(["a"], tmp_path, prompt="other <sent>", model="x")[1] == ["a"]


def test_a_killed_evaluation_goes_on_where_it_stopped(tmp_path: Path) -> None:
    texts = [f"text {i}" for i in range(2500)]

    class Killed(Counting):
        def encode(self, inputs: list[Any], **options: Any) -> np.ndarray:
            if self.encoded:
                raise KeyboardInterrupt
            return super().encode(inputs, **options)

    embedder = CachedEncoder(Killed(), batch_size=4, cache=tmp_path)  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt):
        embedder.embed(texts, prompt=PROMPT, make=str, where=str)
    _, encoded = embed(texts, tmp_path)
    assert encoded == texts[1024:]


def test_damaged_shard_is_left_out_and_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, _ = embed(["a", "b"], tmp_path)
    (shard,) = tmp_path.rglob("*.npz")
    shard.write_bytes(shard.read_bytes()[:100])
    again, encoded = embed(["a", "b"], tmp_path)
    assert encoded == ["a", "b"]
    np.testing.assert_array_equal(again, first)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{shard}: damaged, left out")
    assert embed(["a", "b"], tmp_path)[1] == []  # written anew


def test_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that fails leaves neither a shard nor a temporary file."""
    cache = VectorCache(tmp_path, {"model": "m"})

    def full_disk(file: BinaryIO, **_: np.ndarray) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full_disk)
    with pytest.raises(OSError, match="No space"):
        cache.write([b"k" * 32], np.zeros((1, 3)))
    monkeypatch.undo()
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["about.json"]
    assert VectorCache(tmp_path, {"model": "m"}).vectors == {}


def test_input_keys_tell_inputs_apart(tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    Image.new("RGB", (3, 2), "red").save(picture)
    (tmp_path / "copy.png").write_bytes(picture.read_bytes())
    assert input_key(picture) == input_key(tmp_path / "copy.png") == input_key(picture.read_bytes())
    different = [
        "a",
        "b",
        b"a",
        picture,
        {"text": "a", "image": picture},
        {"text": "b", "image": picture},
        {"text": "a", "image": b"x"},
        Image.new("RGB", (3, 2), "red"),
        Image.new("RGB", (2, 3), "red"),
        Image.new("RGB", (3, 2), "blue"),
        Image.new("L", (6, 3), 0),
    ]
    assert len({input_key(item) for item in different}) == len(different)
    assert input_key({"text": "a"}) == input_key("a")


def test_model_key_follows_what_is_loaded(tmp_path: Path, llava: "Callable[[str], Case]") -> None:
    folder = tmp_path / "model"
    shutil.copytree(llava("llama-gqa").folder, folder)
    adapter = tmp_path / "run"
    (adapter / "checkpoints" / "5").mkdir(parents=True)
    (adapter / "checkpoints" / "5" / "data").write_bytes(b"1")
    (adapter / "metrics.jsonl").write_text("1")
    keys = [model_key(folder, None), model_key(folder, adapter)]
    (adapter / "metrics.jsonl").write_text("1\n2")  # a log, no weight
    assert model_key(folder, adapter) == keys[1]
    (adapter / "checkpoints" / "5" / "data").write_bytes(b"2")
    keys.append(model_key(folder, adapter))
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1  # the same size
    weights.write_bytes(content)
    keys.append(model_key(folder, None))
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text() + "\n")
    keys.append(model_key(folder, None))
    assert len(set(keys)) == len(keys)


def test_large_files_count_by_size_and_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("e5v_jax.checkpoints.model_key._LARGE", 10)
    file = tmp_path / "model.gguf"
    file.write_bytes(b"x" * 20)
    before = model_key(file, None)
    assert model_key(file, None) == before
    os.utime(file, ns=(1, 1))
    assert model_key(file, None) != before


def test_converted_folder_counts_by_its_content_hash(
    tmp_path: Path, llava: "Callable[[str], Case]"
) -> None:
    from e5v_jax.checkpoints.from_hf import Args as ConvertArgs
    from e5v_jax.checkpoints.from_hf import convert

    convert(ConvertArgs(str(llava("llama-gqa").folder), tmp_path / "a"))
    key = model_key(tmp_path / "a", None)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert model_key(tmp_path / "b", None) == key  # wherever it lies
    info = json.loads((tmp_path / "b" / "config.json").read_text())
    (tmp_path / "b" / "config.json").write_text(json.dumps({**info, "content_hash": "0" * 64}))
    assert model_key(tmp_path / "b", None) != key


def test_second_evaluation_embeds_nothing(
    tmp_path: Path, shared: Path, llava: "Callable[[str], Case]", monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole command, twice: texts, photographs and drawn captions; equal figures."""
    source = shared / "data" / "flickr8k"
    lines = (source / "captions.jsonl").read_text().splitlines()[:6]
    (tmp_path / "set" / "images").mkdir(parents=True)
    for line in lines:
        with Image.open(source / "images" / json.loads(line)["image"]) as image:
            small = image.resize((40, 30))
        small.save(tmp_path / "set" / "images" / json.loads(line)["image"])
    (tmp_path / "set" / "captions.jsonl").write_text("\n".join(lines))
    counts: list[int] = []
    real = e5v_jax.E5V.encode

    def counted(self: Any, inputs: Any, **options: Any) -> np.ndarray:
        counts.append(len(inputs))
        return real(self, inputs, **options)

    monkeypatch.setattr(e5v_jax.E5V, "encode", counted)
    results = []
    for name in ("first", "second"):
        evaluate(
            EvaluateConfig(
                model=str(llava("llama-gqa").folder),
                data=tmp_path / "set",
                tasks="retrieval,i2i-retrieval",
                dtype="float32",
                cache=tmp_path / "cache",
                output=tmp_path / name,
            )
        )
        results.append(json.loads((tmp_path / name / "results.json").read_text())["results"])
        assert sum(counts) == 6 + 30 + 30  # the second time, too
    assert results[0] == results[1]
