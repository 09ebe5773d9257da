"""How the encoder batches, and that none of its tricks changes a vector."""

import dataclasses
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from faults import KillWorker, file_size_limit
from hf_models import DOWN, EMBED, NORM, Case, Recipe, build_text, changed, picture

from e5v_jax import E5V
from e5v_jax.checkpoints.tokenizer import load_tokenizer
from e5v_jax.data.images import image_size
from e5v_jax.data.inputs import InputError
from e5v_jax.data.text import IMAGE_BUCKETS, TEXT_BUCKETS, bucket_length
from e5v_jax.encode import compilation, decoding, stream
from e5v_jax.encode.batching import plan_batches
from e5v_jax.encode.decoding import DecodingPool
from e5v_jax.families.base import Measured
from e5v_jax.families.llava_next.presets import ARCHITECTURES
from e5v_jax.families.llava_next.processor import LlavaNextProcessor
from e5v_jax.families.text.model import TextBatch
from e5v_jax.prompts import CHATML, TEXT, fill

TOLERANCE = 1e-6
ITEMS: list[Any] = [f"Text {i}: {'very ' * (i % 5)}short." for i in range(9)]
ITEMS += [picture(40, 60), picture(28, 28), {"text": "smaller", "image": picture(20, 90)}]


@pytest.fixture(scope="module")
def e5v(llava: Callable[[str], Case]) -> E5V:
    return llava("llama-gqa").e5v


@pytest.fixture(scope="module")
def alone(e5v: E5V) -> np.ndarray:
    return np.stack([e5v.encode(item) for item in ITEMS])


def largest(a: np.ndarray, b: np.ndarray) -> float:
    assert a.shape == b.shape
    return float(np.abs(a - b).max())


# --- the same vectors ----------------------------------------------------------------------------


@pytest.mark.parametrize("max_num_batched_tokens", [1, 300, 4000])
def test_token_budget(e5v: E5V, alone: np.ndarray, max_num_batched_tokens: int) -> None:
    found = e5v.encode(ITEMS, max_num_batched_tokens=max_num_batched_tokens)
    assert largest(found, alone) <= TOLERANCE


def test_windows(e5v: E5V, alone: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "WINDOW", 2)
    assert largest(e5v.encode(ITEMS), alone) <= TOLERANCE


def test_worker_processes(e5v: E5V, alone: np.ndarray) -> None:
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        assert largest(e5v.encode(ITEMS, pool=pool), alone) <= TOLERANCE


def test_killed_workers(
    e5v: E5V, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """They are started again and go on; an image that kills one each time is named."""
    names = [tmp_path / f"{i}.png" for i in range(3)]
    for i, name in enumerate(names):
        picture(40, 60, seed=i).save(name)
    expected = e5v.encode(names)
    killer = KillWorker(e5v.processor.load, names[1])
    monkeypatch.setattr(type(e5v.processor), "load", property(lambda _: killer))
    monkeypatch.setattr(stream, "_ATTEMPTS", 2)
    errors: list[InputError] = []
    with DecodingPool(1) as pool:
        found = e5v.encode(names, pool=pool, on_error=errors.append)
    assert "started again (2 of at most 10 times)" in caplog.text
    message = f"{names[1]}: 2 processes that were to decode it were killed: is memory short?"
    assert [(error.position, error.reason) for error in errors] == [(1, message)]
    assert largest(found[[0, 2]], expected[[0, 2]]) <= TOLERANCE


def test_workers_killed_too_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "_RESTARTS", 2)
    with (
        DecodingPool(1) as pool,
        pytest.raises(OSError, match=r"were killed 3 times: is memory short\? Give fewer --num-w"),
    ):
        for _ in range(4):
            with pytest.raises(BrokenExecutor):
                pool.submit(os._exit, 1).result()


def test_workers_that_do_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "_end_with_parent", partial(os._exit, 1))
    with DecodingPool(1) as pool:
        with pytest.raises(BrokenExecutor):
            pool.submit(os.getpid).result()
        with pytest.raises(OSError, match="die at their start: give --num-workers 0 for threads"):
            pool.submit(os.getpid)


def test_workers_end_with_their_parent_and_do_not_hear_ctrl_c() -> None:
    """As a shell sends it: to all processes of a group. Only the first of them answers."""
    code = """
import os, time
from e5v_jax.encode.decoding import DecodingPool
with DecodingPool(2) as pool:
    pool.submit(time.sleep, 0.3)
    print(pool.submit(os.getpid).result(), flush=True)
    time.sleep(60)
"""
    for sent in (signal.SIGINT, signal.SIGKILL):
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert process.stdout is not None
        worker = int(process.stdout.readline())
        (os.killpg if sent == signal.SIGINT else os.kill)(process.pid, sent)
        _, err = process.communicate(timeout=20)
        assert err.count("Traceback") == (sent == signal.SIGINT), err
        deadline = time.monotonic() + 10
        while Path(f"/proc/{worker}/cmdline").exists() and time.monotonic() < deadline:
            if not Path(f"/proc/{worker}/cmdline").read_bytes():  # a zombie
                break
            time.sleep(0.02)
        else:
            assert not Path(f"/proc/{worker}").exists()


def test_last_layer_for_the_pooled_token_only(llava: Callable[[str], Case]) -> None:
    """Rows of several lengths; what is right of the pooled token is not seen."""
    model = llava("llama-gqa").module
    ids = np.random.default_rng(0).integers(0, 256, (3, 12), dtype=np.int32)
    batch = TextBatch(ids, np.array([11, 0, 5], np.int32))
    whole, pooled = (
        jax.jit(run)(model, batch) for run in (lambda m, b: m(b), lambda m, b: m.encode(b))
    )
    scale = float(np.abs(whole).max())
    assert largest(np.asarray(whole), np.asarray(pooled)) <= TOLERANCE * scale
    other = ids.copy()
    other[1:, 6:] = 7
    again = jax.jit(lambda m, b: m.encode(b))(model, TextBatch(other, batch.last_index))
    np.testing.assert_array_equal(np.asarray(again)[1:], np.asarray(pooled)[1:])
    assert largest(np.asarray(pooled)[:1], np.asarray(pooled)[1:2]) > 0.1


def test_equal_inputs_are_embedded_once(e5v: E5V, alone: np.ndarray, tmp_path: Path) -> None:
    ITEMS[9].save(tmp_path / "a.png")
    path = tmp_path / "a.png"
    data = path.read_bytes()
    inputs = [
        ITEMS[0],
        path,
        ITEMS[0],
        {"image": path},
        ITEMS[1],
        path,
        data,
        bytes(bytearray(data)),
    ]
    inputs += [{"text": ITEMS[0]}, str(ITEMS[0]), {"image": str(path)}, {"image": path}]
    before = e5v.statistics.items
    found = e5v.encode(inputs)
    # distinct: two texts, a mapping of one, an image as path, bytes, and mappings of two kinds
    assert e5v.statistics.items - before == 7
    rows = [0, 9, 0, 9, 1, 9, 9, 9, 0, 0, 9, 9]
    assert largest(found, alone[rows]) <= TOLERANCE


def test_bad_inputs_are_told_and_left_out(e5v: E5V, alone: np.ndarray) -> None:
    """Of equal ones each; a broken image is found later than a bad text."""
    broken = b"GIF89a" + bytes(7)
    inputs = [ITEMS[0], " ", ITEMS[9], " ", b"no image", broken, ITEMS[1]]
    errors: list[InputError] = []
    found = e5v.encode(inputs, on_error=errors.append, normalize_embeddings=True)
    assert sorted(error.position for error in errors) == [1, 3, 4, 5]
    assert largest(found[[0, 2, 6]], alone[[0, 9, 1]]) <= TOLERANCE
    assert not found[[1, 3, 4, 5]].any()
    with pytest.raises(InputError, match="input 1: the text is empty"):
        e5v.encode(inputs[:4])


# --- vectors that say nothing --------------------------------------------------------------------


@pytest.fixture(scope="module")
def own(llava: Callable[[str], Case]) -> E5V:
    return llava("llama-gqa").load()


@pytest.mark.parametrize(
    ("name", "new", "flaw"),
    [
        (DOWN, lambda x: x.at[1, 3, 5].set(np.nan), "not finite"),
        (NORM, lambda x: x.at[7].set(np.inf), "not finite"),
        (NORM, lambda x: x * np.float32(1e30), "not finite"),  # each value is, their length not
        (NORM, lambda x: x * 0, "of no length"),
        (NORM, lambda x: x * np.float32(1e-30), "of no length"),
    ],
)
def test_no_vector_that_says_nothing(
    own: E5V, name: str, new: Callable[[Any], Any], flaw: str
) -> None:
    with changed(own, name, new):
        for normalize in (True, False):
            with pytest.raises(InputError, match=rf"input \d: its vector is {flaw}: is the model"):
                own.encode(ITEMS[:3], normalize_embeddings=normalize)
        errors: list[InputError] = []
        assert not own.encode(ITEMS[:3], on_error=errors.append).any()
    assert sorted(error.position for error in errors) == [0, 1, 2]


def test_a_part_of_no_length(own: E5V) -> None:
    with changed(own, NORM, lambda x: x.at[:3].set(0)):
        assert own.encode(ITEMS[0], truncate_dim=4)[3] in (1, -1)
        with pytest.raises(InputError, match="input 0: its vector is of no length"):
            own.encode(ITEMS[0], truncate_dim=3)


def test_overflow_in_float16(own: E5V, llava: Callable[[str], Case]) -> None:
    """What float32 computes, float16 does not: it is told, not returned."""
    with changed(own, DOWN, lambda x: x * 30_000):
        assert np.isfinite(own.encode(ITEMS[:3])).all()
    half = llava("llama-gqa").load("float16")
    assert np.isfinite(half.encode(ITEMS[:3])).all()
    with (
        changed(half, DOWN, lambda x: x * 30_000),
        pytest.raises(InputError, match=r"vector is not finite: .* choose bfloat16 or float32"),
    ):
        half.encode(ITEMS[:3])


def test_only_the_bad_ones(own: E5V, alone: np.ndarray) -> None:
    """One token is broken: inputs without it are as they were, equal ones are told each."""
    errors: list[InputError] = []
    done: list[int] = []
    inputs = [ITEMS[0], "Z", ITEMS[9], "Z", ITEMS[1]]
    token = own.tokenizer.convert_tokens_to_ids("Z")
    with changed(own, EMBED, lambda x: x.at[token].set(np.nan)):
        found = own.encode(inputs, on_error=errors.append, on_batch=done.append)
        with pytest.raises(InputError, match="input 1: its vector is not finite"):
            own.encode(inputs)
    assert sorted(error.position for error in errors) == [1, 3] and sum(done) == 3
    assert largest(found[[0, 2, 4]], alone[[0, 9, 1]]) <= TOLERANCE
    assert not found[[1, 3]].any()


# --- batches -------------------------------------------------------------------------------------


def padded_length(length: int, shape_key: int) -> int:
    return bucket_length(length, IMAGE_BUCKETS if shape_key else TEXT_BUCKETS)


def measured(lengths: list[int], tiles: int = 0) -> list[Measured]:
    return [Measured(i, [1], length, shape_key=tiles) for i, length in enumerate(lengths)]


def test_plan_holds_every_item_once_and_keeps_its_limits() -> None:
    rng = np.random.default_rng(0)
    for max_rows, max_tokens, multiple in (
        (None, 1024, 1),
        (5, 1024, 1),
        (None, 512, 4),
        (5, 1024, 8),
    ):
        items = measured(rng.integers(1, 600, 200).tolist()) + measured([900, 700, 800], tiles=3)
        batches = list(
            plan_batches(
                items,
                padded_length=padded_length,
                max_rows=max_rows,
                max_tokens=max_tokens,
                multiple=multiple,
            )
        )
        assert sorted(map(id, items)) == sorted(id(i) for batch in batches for i in batch.items)
        for batch in batches:
            rows, length = batch.shape.rows, batch.shape.length
            assert max(item.length for item in batch.items) <= length
            assert len(batch.items) <= rows and rows % multiple == 0
            assert max_rows is None or rows <= -(-max_rows // multiple) * multiple
            assert max_rows is None or len(batch.items) <= max_rows
            assert rows * length <= max(max_tokens, length * multiple) * (1 if multiple == 1 else 2)
            assert {item.shape_key for item in batch.items} == {batch.shape.shape_key}
        keys = [batch.shape.shape_key for batch in batches]
        assert keys == sorted(keys, reverse=True)


def padding_and_shapes(items: list[Measured], max_tokens: int) -> tuple[float, int]:
    batches = list(
        plan_batches(
            items,
            padded_length=padded_length,
            max_rows=None,
            max_tokens=max_tokens,
            multiple=1,
        )
    )
    positions = sum(batch.shape.rows * batch.shape.length for batch in batches)
    padding = 1 - sum(item.length for item in items) / positions
    return padding, len({batch.shape for batch in batches})


@pytest.mark.parametrize("max_tokens", [1024, 2048])
def test_padding_of_sts_sentences(shared: Path, smollm2_gguf: Path, max_tokens: int) -> None:
    lines = (shared / "data/sts/STS/STSBenchmark/sts-test.csv").read_text("utf-8").splitlines()
    sentences = {text for line in lines for text in line.split("\t")[5:7]}
    filled = [fill(TEXT, template=CHATML, text=text) for text in sorted(sentences)]
    ids = load_tokenizer(smollm2_gguf)(filled)["input_ids"]
    padding, shapes = padding_and_shapes(measured([len(x) for x in ids]), max_tokens)
    assert padding < 0.1 and shapes <= 12


@pytest.mark.parametrize("max_tokens", [1024, 16384])
@pytest.mark.parametrize("patch_size", [14, 16])
def test_padding_of_photographs(shared: Path, patch_size: int, max_tokens: int) -> None:
    architecture = ARCHITECTURES["llava-next-llama3-8b"]
    vision = dataclasses.replace(architecture.vision, patch_size=patch_size)
    processor = object.__new__(LlavaNextProcessor)  # to measure images it needs no tokenizer
    processor.config = dataclasses.replace(architecture, vision=vision)
    items = []
    for path in sorted((shared / "data/flickr8k").rglob("*.jpg")):
        size = image_size(path)
        tokens, tiles = processor.measure_image(size)
        items.append(Measured(len(items), [1], tokens + 20, tiles, path, size))
    assert len(items) == 200
    padding, shapes = padding_and_shapes(items, max_tokens)
    assert padding < 0.1 and shapes <= 12


def test_loading_switches_nothing_of_jax(
    llava: Callable[[str], Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A constructor is no place for it: the commands switch the compilation cache on."""
    changed: list[str] = []
    monkeypatch.setattr(jax.config, "update", lambda key, value: changed.append(key))
    llava("llama-gqa").load()
    assert not changed


def test_compilations_are_counted_and_logged(
    llava: Callable[[str], Case], caplog: pytest.LogCaptureFixture
) -> None:
    model = llava("llama-gqa").load()
    with caplog.at_level(logging.INFO, logger="e5v_jax"):
        for _ in range(2):
            model.encode(["a", "b" * 40], batch_size=1)
            model.encode(ITEMS[9])
    messages = [record.message for record in caplog.records if "compiled" in record.message]
    assert len(messages) == len(model.statistics.compilations) == 3
    assert "(shape 3, " in messages[-1] and "and 5 tiles" in messages[-1]
    assert model.statistics.items == 6
    assert 0 < model.statistics.padding < 1


# --- quantised, and the compilation cache --------------------------------------------------------


@pytest.mark.parametrize(("quantize", "least"), [("int8", 0.999), ("nf4", 0.9)])
def test_quantised_weights(quantize: Any, least: float, tmp_path: Path) -> None:
    """Near the unquantised vectors, and not the same."""
    text = {"vocab_size": 264, "intermediate_size": 128}  # nf4 needs multiples of 64
    build_text(Recipe(template="chatml", text=text, seed=3), tmp_path)
    expected = E5V.from_pretrained(tmp_path, dtype="float32").encode(ITEMS[:9])
    found = E5V.from_pretrained(tmp_path, dtype="float32", quantize=quantize).encode(ITEMS[:9])
    cosines = (found * expected).sum(axis=1)
    assert least < cosines.min() < 1 - 1e-7


@pytest.fixture
def no_cache() -> Iterator[None]:
    """Without the folder that conftest.py has set."""
    name = "jax_compilation_cache_dir"
    folder = jax.config.values[name]
    jax.config.update(name, None)
    yield
    jax.config.update(name, folder)


@pytest.mark.usefixtures("no_cache")
def test_compilation_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    updates: dict[str, Any] = {}
    monkeypatch.setattr(jax.config, "update", lambda key, value: updates.update({key: value}))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(compilation.VARIABLE, "off")
    assert compilation.use_compilation_cache() is None and not updates
    monkeypatch.delenv(compilation.VARIABLE)
    folder = compilation.use_compilation_cache()
    assert folder is not None and folder.parent == tmp_path / "e5v_jax"
    assert updates["jax_compilation_cache_dir"] == str(folder)
    monkeypatch.setenv(compilation.VARIABLE, str(tmp_path / "own"))
    assert compilation.use_compilation_cache() == tmp_path / "own"


@pytest.mark.usefixtures("no_cache")
def test_no_place_for_the_compilation_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One line before the first program, not a warning of JAX's with each."""
    (tmp_path / "file").touch()
    monkeypatch.setenv(compilation.VARIABLE, str(tmp_path / "file"))
    assert compilation.use_compilation_cache() is None
    assert jax.config.values["jax_compilation_cache_dir"] is None
    monkeypatch.setenv(compilation.VARIABLE, str(tmp_path / "full"))
    monkeypatch.setattr(compilation, "_ROOM", 20_000)
    with file_size_limit(10_000):
        assert compilation.use_compilation_cache() is None
    assert [message.partition(": ")[2][:25] for message in caplog.messages] == [
        "no compilation cache ther"
    ] * 2
    assert "(File exists)" in caplog.text and "(File too large)" in caplog.text


@pytest.mark.parametrize("limit", ["batch_size", "max_num_batched_tokens"])
def test_batches_of_nothing(e5v: E5V, limit: str) -> None:
    with pytest.raises(ValueError, match=f"{limit} 0: expected at least 1"):
        e5v.encode("a dog", **{limit: 0})


@pytest.mark.parametrize(
    ("option", "value"),
    [("dtype", "float64"), ("quantize", "int4"), ("attn_implementation", "flash")],
)
def test_unknown_options(option: str, value: str) -> None:
    """Before anything is read: there is no model."""
    options: Any = {option: value}
    with pytest.raises(ValueError, match=f"{option} '{value}': expected one of "):
        E5V.from_pretrained("no-model", **options)
