"""Calls of ``encode`` as people write them: containers, paths, others' arguments, forks."""

import os
import signal
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pytest
from hf_models import picture

from e5v_jax import E5V

if TYPE_CHECKING:
    from hf_models import Case

TEXTS = ["a dog", "two cats", "the café is open", "a dog"]


@pytest.fixture(scope="module")
def e5v(llava: "Callable[[str], Case]") -> E5V:
    return llava("llama-gqa").e5v


@pytest.fixture(scope="module")
def expected(e5v: E5V) -> np.ndarray:
    return e5v.encode(TEXTS)


def in_pandas(texts: list[str]) -> Any:
    return pytest.importorskip("pandas").Series(texts, index=range(7, 7 + len(texts)))


def in_polars(texts: list[str]) -> Any:
    return pytest.importorskip("polars").Series(texts)


def in_datasets(texts: list[str]) -> Any:
    return pytest.importorskip("datasets").Dataset.from_dict({"text": texts})["text"]


@pytest.mark.parametrize(
    "make",
    [
        tuple,
        iter,
        np.array,
        lambda texts: np.array(texts, object),
        lambda texts: (text for text in texts),
        lambda texts: dict(enumerate(texts)).values(),
        pa.array,
        lambda texts: pa.chunked_array([texts[:1], texts[1:]]),
        lambda texts: pa.table({"text": texts}),
        in_pandas,
        in_polars,
        in_datasets,
    ],
)
def test_inputs_come_in_any_iterable(
    make: Callable[[list[str]], Any], e5v: E5V, expected: np.ndarray
) -> None:
    np.testing.assert_array_equal(e5v.encode(make(TEXTS)), expected)


def test_images_by_their_paths(e5v: E5V, tmp_path: Path) -> None:
    """A str is a path among ``images``, and a text everywhere else."""
    paths = [str(tmp_path / f"{i}.png") for i in range(2)]
    for i, path in enumerate(paths):
        picture(30, 40 + i, seed=i).save(path)
    expected = e5v.encode([Path(path) for path in paths])
    np.testing.assert_array_equal(e5v.encode(images=iter(paths)), expected)
    np.testing.assert_array_equal(e5v.encode_query(images=np.array(paths)), expected)
    alone = e5v.encode(images=paths[1])
    np.testing.assert_allclose(alone, expected[1], atol=1e-6)
    with pytest.raises(ValueError, match=r"^input 1: no/such\.png: no such file"):
        e5v.encode(images=[paths[0], "no/such.png"])


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        (None, {}, "give inputs or images; one with both is {'text': ..., 'image': ...}"),
        (TEXTS, {"images": ["a.png"]}, "give inputs or images; one with both is"),
        ({"a", "b"}, {}, "inputs: a set has no order for the vectors: give a list"),
        (np.zeros((2, 3), np.uint8), {}, r"inputs: an array of uint8 [2, 3], expected a row"),
        (np.array([["a"]]), {}, "inputs: an array of <U1 [1, 1], expected a row of texts"),
        (["a", None], {}, "input 1: unsupported input of type NoneType"),
        (3, {}, "input 0: unsupported input of type int"),
        (TEXTS, {"truncate_dim": 2.5}, "truncate_dim 2.5: expected a whole number"),
        (TEXTS, {"batch_size": "a"}, "batch_size 'a': expected a whole number"),
        (TEXTS, {"batch_size": True}, "batch_size True: expected a whole number"),
        (TEXTS, {"max_length": "9"}, "max_length '9': expected a whole number"),
        (TEXTS, {"prompt": ["<sent>"]}, "prompt ['<sent>']: expected a str"),
        (TEXTS, {"normalize_embeddings": None}, "normalize_embeddings None: expected a bool"),
        (TEXTS, {"show_progress_bar": "no"}, "show_progress_bar 'no': expected a bool"),
        (
            TEXTS,
            {"convert_to_tensor": True},
            "convert_to_tensor True: vectors are a NumPy array: t",
        ),
        (
            TEXTS,
            {"convert_to_numpy": False},
            "convert_to_numpy False: vectors are a NumPy array: l",
        ),
        (TEXTS, {"output_value": "token_embeddings"}, "output_value 'token_embeddings': only the"),
        (TEXTS, {"precision": "int8"}, "precision 'int8': vectors are float32: "),
        (TEXTS, {"device": "cuda"}, "device 'cuda': E5V.from_pretrained's mesh says the devices"),
    ],
)
def test_what_is_not_followed_is_named(
    inputs: Any, options: dict[str, Any], message: str, e5v: E5V
) -> None:
    with pytest.raises(ValueError) as caught:
        e5v.encode(inputs, **options)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_a_data_frame_is_no_list(e5v: E5V) -> None:
    """Its items would be the names of its columns."""
    frame = pytest.importorskip("pandas").DataFrame({"text": TEXTS})
    with pytest.raises(ValueError, match=r"inputs: a DataFrame is no list .* frame\['text'\]"):
        e5v.encode(frame)


def test_arguments_that_ask_for_what_is_done(e5v: E5V, expected: np.ndarray) -> None:
    options: dict[str, Any] = {"convert_to_numpy": True, "convert_to_tensor": False, "device": None}
    found = e5v.encode(TEXTS, batch_size=np.int64(32), truncate_dim=None, **options)
    np.testing.assert_array_equal(found, expected)
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'batchsize'$"):
        e5v.encode(TEXTS, batchsize=3)


def test_threads_get_the_same_bits(e5v: E5V) -> None:
    calls = [[*TEXTS[i % 3 :], {"image": picture(30, 40, seed=i % 2)}] for i in range(16)]
    expected = [e5v.encode(call) for call in calls]
    with ThreadPoolExecutor(8) as threads:
        for found, alone in zip(threads.map(e5v.encode, calls), expected, strict=True):
            np.testing.assert_array_equal(found, alone)


def test_a_fork_is_refused(e5v: E5V, tmp_path: Path) -> None:
    """JAX would wait for threads that it does not have."""
    told = tmp_path / "told"
    with warnings.catch_warnings(action="ignore"):  # of JAX and Python, of the same
        child = os.fork()
    if child == 0:
        try:
            for call in (lambda: e5v.encode(TEXTS), lambda: E5V.from_pretrained("any")):
                try:
                    call()
                except RuntimeError as error:
                    with told.open("a") as file:
                        file.write(f"{error}\n")
        finally:
            os._exit(0)  # without the parent's fixtures
    for _ in range(200):
        if os.waitpid(child, os.WNOHANG)[0]:
            break
        time.sleep(0.05)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    says = f"process {child} is a fork of {os.getpid()}, which has used JAX, whose threads are "
    lines = told.read_text().splitlines()
    assert len(lines) == 2 and all(line.startswith(says) for line in lines)
