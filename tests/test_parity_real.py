"""The real SmolLM2-135M, converted from its GGUF file, against transformers reading that file."""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hf_models import prompt_of
from transformers import AutoTokenizer

from e5v_jax import E5V
from e5v_jax.checkpoints.converted import ConvertedFolder
from e5v_jax.checkpoints.loading import load_model
from e5v_jax.checkpoints.tokenizer import load_tokenizer
from e5v_jax.data.text import encode_batch, pad_right
from e5v_jax.evaluate.sts import load_task, score_tasks
from e5v_jax.families.text.model import TextModel
from e5v_jax.families.text.processor import TextProcessor
from e5v_jax.nn.layers import Build, Precision
from e5v_jax.runtime import Runtime
from e5v_jax.sharding import make_mesh

pytestmark = pytest.mark.optimized

SENTENCES = [
    "A dog sits.",
    "Two men play football in the rain while a third one, in a red jacket, watches them.",
    "The stock market fell 3.7% on Tuesday, its largest drop since March 2009.",
    "no",
    "Is this a question?",
    "Ein kleines Mädchen läuft über die Straße.",
    "猫が窓の外を見ている。",
    "🎉🎉 party!!! #tonight",
    "def f(x):\n    return x ** 2  # square",
    "    leading spaces and\ttabs   in   between",
    "supercalifragilisticexpialidocious antidisestablishmentarianism",
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the "
    "age of foolishness, it was the epoch of belief, it was the epoch of incredulity.",
]


@pytest.fixture(scope="module")
def module(smollm2_converted: Path) -> TextModel:
    precision = Precision(param=np.float32, compute=np.float32)
    source = ConvertedFolder(smollm2_converted)
    return load_model(source, Build(precision, Runtime.on(make_mesh(1, 1))))


@pytest.fixture(scope="module")
def e5v(smollm2_converted: Path, module: TextModel) -> E5V:
    config = ConvertedFolder(smollm2_converted).config
    return E5V(module, TextProcessor(config, load_tokenizer(smollm2_converted)))


@pytest.fixture(scope="module")
def torch_hidden(smollm2_gguf: Path, smollm2_torch: Any) -> list[np.ndarray]:
    """After the final norm, every position of every sentence in its prompt: fp32 [L, D] each."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name)
    hidden = []
    with torch.no_grad():
        for sentence in SENTENCES:
            inputs = tokenizer(prompt_of(sentence, "chatml")[0], return_tensors="pt")
            hidden.append(smollm2_torch.model(**inputs).last_hidden_state[0].numpy())
    return hidden


def test_hidden_states_of_all_positions(
    module: TextModel, e5v: E5V, torch_hidden: list[np.ndarray]
) -> None:
    prompts = [prompt_of(sentence, "chatml")[0] for sentence in SENTENCES]
    sequences = encode_batch(e5v.tokenizer, prompts)
    assert [len(s) for s in sequences] == [len(h) for h in torch_hidden]
    ids, _ = pad_right(sequences, max(map(len, sequences)), pad_id=0)

    @jax.jit
    def run(module: TextModel, ids: jax.Array) -> jax.Array:
        decoder = module.language_model
        return decoder.norm(decoder(decoder.embed(ids)))

    found = np.asarray(run(module, jnp.asarray(ids)))  # [B, L, D]
    for row, expected in zip(found, torch_hidden, strict=True):
        ours = row[: len(expected)]
        norms = np.linalg.norm(ours, axis=1) * np.linalg.norm(expected, axis=1)
        assert ((ours * expected).sum(axis=1) / norms).min() >= 0.9999


def test_embeddings(e5v: E5V, torch_hidden: list[np.ndarray]) -> None:
    """Through E5V, template and prompt chosen by it, in one padded batch."""
    last = np.stack([hidden[-1] for hidden in torch_hidden])
    expected = last / np.linalg.norm(last, axis=1, keepdims=True)
    assert e5v.template == "chatml"
    found = e5v.encode(SENTENCES, batch_size=12)
    assert np.abs(found - expected).max() <= 1e-5
    alone = e5v.encode(SENTENCES[:1], batch_size=1)  # no mates, less padding
    assert np.abs(found[:1] - alone).max() <= 1e-6


def test_embeddings_bf16(smollm2_converted: Path, torch_hidden: list[np.ndarray]) -> None:
    last = np.stack([hidden[-1] for hidden in torch_hidden])
    found = E5V.from_pretrained(smollm2_converted, dtype="bfloat16").encode(
        SENTENCES, batch_size=12
    )
    cosine = (found * last).sum(axis=1) / np.linalg.norm(last, axis=1)
    assert cosine.min() >= 0.999


@pytest.mark.slow
def test_stsb_prompt_only(e5v: E5V, shared: Path) -> None:
    """PyTorch scored 29.1 with the plain protocol: sentences as they stand, no spaces around."""
    encode = partial(e5v.encode, prompt_name="plain", batch_size=64)
    pairs = load_task(shared / "data" / "sts", "stsb")
    (score,) = score_tasks(encode, {"stsb": pairs}, clean=str.strip).values()
    assert len(score.items) == 1379
    assert score.items.value() == pytest.approx(29.1, abs=0.3)
