"""What surrounds an item in a call to encode does not touch its embedding; the API around it."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hf_models import Case, picture

from e5v_jax import E5V
from e5v_jax.families.llava_next import processor as llava_processor
from e5v_jax.families.text import processor as text_processor

TOLERANCE = 1e-6
TEXTS = ["A dog sits.", "Snow.", "Two men play football in the rain while a third one watches."]
LONG = "A very long sentence about nothing in particular, " * 8
IMAGES: list[Any] = [picture(70, 45), picture(50, 50), picture(8, 200)]
BOTH: list[Any] = [
    {"text": "at night", "image": picture(20, 90)},
    {"text": "with two dogs instead of one", "image": picture(61, 33)},
]
MIXED = [TEXTS[0], IMAGES[0], BOTH[0], TEXTS[1], IMAGES[1], BOTH[1], TEXTS[2], IMAGES[2]]


@pytest.fixture(scope="module")
def e5v(llava: Callable[[str], Case]) -> E5V:
    return llava("llama-gqa").e5v


@pytest.fixture(scope="module")
def alone(e5v: E5V) -> np.ndarray:
    """Every item of MIXED in a call and a batch of its own, fp32 [N, D]."""
    vectors = np.stack([e5v.encode([item], batch_size=1)[0] for item in MIXED])
    cosine = vectors @ vectors.T - np.eye(len(MIXED))
    assert cosine.max() < 0.99  # no two items are alike: a mix-up would show
    return vectors


def largest(a: np.ndarray, b: np.ndarray) -> float:
    assert a.shape == b.shape
    return float(np.abs(a - b).max())


# --- batch mates, order, padding -----------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", [TEXTS, IMAGES, BOTH, MIXED], ids=["text", "image", "both", "mixed"]
)
def test_batch_mates(kind: Sequence[Any], e5v: E5V, alone: np.ndarray) -> None:
    rows = [next(i for i, item in enumerate(MIXED) if item is member) for member in kind]
    assert largest(e5v.encode(list(kind)), alone[rows]) <= TOLERANCE


def test_order(e5v: E5V, alone: np.ndarray) -> None:
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(len(MIXED))
        assert largest(e5v.encode([MIXED[i] for i in order]), alone[order]) <= TOLERANCE


def test_batch_size(e5v: E5V, alone: np.ndarray) -> None:
    """Two batches of text, the second one short."""
    assert largest(e5v.encode(MIXED, batch_size=2), alone) <= TOLERANCE


def test_padding(e5v: E5V, alone: np.ndarray) -> None:
    """Long mates pad the short ones to their length; the same item twice is the same twice."""
    long_both = {"text": LONG, "image": picture(50, 50, seed=1)}
    found = e5v.encode([LONG, *MIXED, long_both, *MIXED])
    n = len(MIXED)
    assert largest(found[1 : n + 1], alone) <= TOLERANCE
    assert largest(found[n + 2 :], alone) <= TOLERANCE
    assert largest(found[0], e5v.encode(LONG)) <= TOLERANCE


def test_mates_would_show(e5v: E5V, alone: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same tests fail when the last position of the batch is pooled instead of the item's."""
    pad_right = text_processor.pad_right

    def pooled_at_the_end(*args: Any, **kwargs: Any) -> tuple[np.ndarray, np.ndarray]:
        ids, last = pad_right(*args, **kwargs)
        return ids, np.full_like(last, ids.shape[1] - 1)

    monkeypatch.setattr(text_processor, "pad_right", pooled_at_the_end)
    monkeypatch.setattr(llava_processor, "pad_right", pooled_at_the_end)
    assert largest(e5v.encode(MIXED), alone) > 1e-2


# --- the call ------------------------------------------------------------------------------------


def test_single_inputs(e5v: E5V, alone: np.ndarray, tmp_path: Path) -> None:
    """One input that is not a list gives [D]; however an image is given, it is the same image."""
    path = tmp_path / "image.png"
    IMAGES[0].save(path)
    data = io.BytesIO()
    IMAGES[0].save(data, "PNG")
    for item in (IMAGES[0], path, data.getvalue(), {"image": str(path)}, {"image": path}):
        found = e5v.encode(item)
        assert found.shape == (64,) and found.dtype == np.float32
        assert largest(found, alone[1]) <= TOLERANCE
    for text in (TEXTS[0], {"text": TEXTS[0]}):
        found = e5v.encode(text)
        assert found.shape == (64,)
        assert largest(found, alone[0]) <= TOLERANCE
    assert e5v.encode((TEXTS[0],)).shape == (1, 64)


def test_no_inputs(e5v: E5V) -> None:
    found = e5v.encode([])
    assert found.shape == (0, 64) and found.dtype == np.float32


def test_normalisation_and_truncation(e5v: E5V, alone: np.ndarray) -> None:
    np.testing.assert_allclose(np.linalg.norm(alone, axis=1), 1, atol=1e-6)
    raw = e5v.encode(MIXED, normalize_embeddings=False)
    norms = np.linalg.norm(raw, axis=1, keepdims=True)
    assert norms.min() > 2  # they do need normalising
    assert largest(raw / norms, alone) <= TOLERANCE
    short = e5v.encode(MIXED, truncate_dim=10)
    assert short.shape == (len(MIXED), 10)
    np.testing.assert_allclose(np.linalg.norm(short, axis=1), 1, atol=1e-6)
    renormalised = raw[:, :10] / np.linalg.norm(raw[:, :10], axis=1, keepdims=True)
    assert largest(short, renormalised) <= TOLERANCE
    cut = e5v.encode(MIXED, truncate_dim=10, normalize_embeddings=False)
    assert largest(cut, raw[:, :10]) <= 1e-5
    assert e5v.encode(TEXTS[0], truncate_dim=10).shape == (10,)
    for bad in (0, -1, 65):
        with pytest.raises(ValueError, match=f"truncate_dim {bad}: expected 1 to 64"):
            e5v.encode(TEXTS, truncate_dim=bad)


def test_similarity(e5v: E5V, alone: np.ndarray) -> None:
    found = e5v.similarity(3 * alone, alone[:2])
    assert found.shape == (len(MIXED), 2)
    np.testing.assert_allclose(found, alone @ alone[:2].T, atol=1e-6)
    assert e5v.similarity(alone[0], alone).shape == (1, len(MIXED))


def test_prompts(e5v: E5V) -> None:
    """Named, own and automatic prompts are different texts to the model."""
    text = TEXTS[:1]
    auto = e5v.encode(text)
    assert largest(e5v.encode(text, prompt_name="text"), auto) <= TOLERANCE
    own = e5v.encode(text, prompt="<sent>\nSummary above sentence in one word: ")
    assert largest(own, auto) <= TOLERANCE
    assert largest(e5v.encode(text, prompt_name="sts"), auto) > 1e-3


# --- bad inputs ----------------------------------------------------------------------------------

BAD_INPUTS: dict[str, tuple[Any, str]] = {
    "empty text": ("  ", "empty"),
    "forged image": ("a <image> b", "'<image>'"),
    "special token": ("hi<|eot_id|>", r"'<\|eot_id\|>'"),
    "lone surrogate": ("a\ud800", "surrogate"),
    "missing file": (Path("no/such/file.png"), "no such file"),
    "broken image": (b"not an image", "not an image"),
    "unknown key": ({"txt": "a"}, "unknown key 'txt'"),
    "nothing": ({}, "neither 'text' nor 'image'"),
    "wrong type": (3, "unsupported input of type int"),
    "text of wrong type": ({"text": 3}, "'text' is a int"),
    "image of wrong type": ({"image": 3}, "image"),
    "too long": ("word " * 600, "tokens, the model takes at most 2048"),
}


@pytest.mark.parametrize("kind", BAD_INPUTS)
def test_errors_name_the_position(kind: str, e5v: E5V) -> None:
    bad, message = BAD_INPUTS[kind]
    with pytest.raises(ValueError, match=message) as error:
        e5v.encode([TEXTS[0], IMAGES[0], bad, TEXTS[1]], special_tokens="refuse")
    assert str(error.value).startswith("input 2: ")
    assert "\n" not in str(error.value)


def test_prompt_and_input_must_agree(e5v: E5V) -> None:
    with pytest.raises(ValueError, match="input 1: the input has an image"):
        e5v.encode([TEXTS[0], IMAGES[0]], prompt_name="text")
    with pytest.raises(ValueError, match="input 0: the input has no image"):
        e5v.encode(TEXTS, prompt_name="image")
    with pytest.raises(ValueError, match="not both"):
        e5v.encode(TEXTS, prompt_name="text", prompt="<sent>")
    with pytest.raises(ValueError, match="prompt_name 'tex': expected one of"):
        e5v.encode(TEXTS, prompt_name="tex")
