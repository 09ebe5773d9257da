"""mteb's interface: tasks of its shipped classes run offline, batches of every kind."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import mteb
import numpy as np
import pytest
from datasets import Dataset
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.mocks.mock_tasks.sts import MockSTSTask
from mteb.models.model_meta import ModelMeta
from mteb.models.models_protocols import EncoderProtocol
from PIL import Image

from e5v_jax.encode.model_args import ModelArgs
from e5v_jax.integrations.mteb import NAME, MtebEncoder, split_batch

if TYPE_CHECKING:
    from hf_models import Case

KINDS = {"t2i": ("text", "image"), "i2t": ("image", "text"), "it2i": ("fused", "image")}


def pictures(count: int) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [
        Image.fromarray(rng.integers(0, 256, (30, 40 + i, 3), dtype=np.uint8)) for i in range(count)
    ]


def columns(kind: str, count: int) -> dict[str, list[Any]]:
    texts = [f"a caption, number {i}" for i in range(count)]
    return {
        "text": {"text": texts},
        "image": {"image": pictures(count)},
        "fused": {"text": texts, "image": pictures(count)},
    }[kind]


def make_task(category: str) -> AbsTaskRetrieval:
    """Retrieval of mteb's own class over a few rows made here."""
    query, document = KINDS[category]

    class Small(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name=f"Small{category.upper()}",
            description="Rows made for a test.",
            reference="https://example.org",
            dataset={"path": "none", "revision": "none"},
            type="Any2AnyRetrieval",
            category=category,
            modalities=["text", "image"],
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="recall_at_1",
            date=("2024-01-01", "2024-01-01"),
            domains=[],
            task_subtypes=[],
            license="cc-by-4.0",
            annotations_creators="derived",
            dialect=[],
            sample_creation="created",
            bibtex_citation="",
        )

        def load_data(self, num_proc: int | None = None, **_: Any) -> None:
            ids = [str(i) for i in range(6)]
            data = RetrievalSplitData(
                queries=Dataset.from_dict({"id": [f"q{i}" for i in ids], **columns(query, 6)}),
                corpus=Dataset.from_dict({"id": [f"d{i}" for i in ids], **columns(document, 6)}),
                relevant_docs={f"q{i}": {f"d{i}": 1} for i in ids},
                top_ranked=None,
            )
            self.dataset = {"default": {"test": data}}
            self.data_loaded = True

    return Small()


@pytest.fixture
def encoder(llava: "Callable[[str], Case]") -> MtebEncoder:
    return MtebEncoder(model=llava("llama-gqa").e5v)


@pytest.mark.parametrize("category", KINDS)
def test_retrieval_task_runs(encoder: MtebEncoder, category: str) -> None:
    """The score is the one that our own vectors give."""
    result = mteb.evaluate(encoder, make_task(category), cache=None, show_progress_bar=False)
    (scores,) = result.task_results[0].scores["test"]
    query, document = (
        encoder.model.encode(split_batch(columns(kind, 6)))  # type: ignore[arg-type]
        for kind in KINDS[category]
    )
    order = np.argsort(-(query @ document.T), axis=1)
    for k in (1, 3, 5):
        expected = np.mean([i in row[:k] for i, row in enumerate(order)])
        assert scores[f"recall_at_{k}"] == pytest.approx(expected, abs=1e-5)
    assert result.model_name == NAME


def test_sts_task_runs(encoder: MtebEncoder) -> None:
    """A task that mteb ships for tests."""
    result = mteb.evaluate(encoder, MockSTSTask(), cache=None, show_progress_bar=False)
    (scores,) = result.task_results[0].scores["test"]
    assert abs(scores["cosine_spearman"]) == pytest.approx(1)  # two pairs


def test_registered_under_its_own_name(
    llava: "Callable[[str], Case]", monkeypatch: pytest.MonkeyPatch
) -> None:
    meta = mteb.get_model_meta(NAME)
    assert meta.framework == ["JAX"] and set(meta.modalities) == {"text", "image"}
    assert mteb.get_model_meta("royokong/e5-v").framework != ["JAX"]  # mteb's own stays
    # mteb wants torchvision for any model with images; nothing used here does
    monkeypatch.setattr(ModelMeta, "_check_requirements", lambda self: None)
    found = mteb.get_model(NAME, path=llava("llama-gqa").folder, dtype="float32")
    assert isinstance(found, MtebEncoder) and isinstance(found, EncoderProtocol)
    expected = llava("llama-gqa").e5v.encode(["a dog"])
    np.testing.assert_array_equal(found.model.encode(["a dog"]), expected)


def test_takes_the_flags_of_the_commands(llava: "Callable[[str], Case]") -> None:
    args = ModelArgs(model=str(llava("llama-gqa").folder), dtype="float32")
    expected = llava("llama-gqa").e5v.encode(["a dog"])
    np.testing.assert_array_equal(MtebEncoder(model=args).model.encode(["a dog"]), expected)
    with pytest.raises(ValueError, match="--fsdp: 0"):
        MtebEncoder(path="m", fsdp=0)


def test_batches_are_joined_in_order(encoder: MtebEncoder) -> None:
    """More rows than are embedded at once, in batches of an odd size."""
    texts = [f"text {'long ' * (i % 7)}{i}" for i in range(150)]
    batches = [{"text": texts[i : i + 7]} for i in range(0, 150, 7)]
    vectors = encoder.encode(
        batches,  # type: ignore[arg-type]
        task_metadata=MockSTSTask().metadata,
        hf_split="test",
        hf_subset="default",
        batch_size=8,
    )
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, encoder.model.encode(texts), atol=1e-5)


def test_a_bad_input_is_counted_over_all_batches(encoder: MtebEncoder) -> None:
    batches = [{"text": [f"text {i}" if i != 100 else " "]} for i in range(150)]
    with pytest.raises(ValueError, match="input 100: the text is empty"):
        encoder.encode(batches)  # type: ignore[arg-type]


def test_blank_text_beside_an_image_is_no_text() -> None:
    image = pictures(1)[0]
    rows = split_batch({"text": ["a", " "], "image": [image, image]})  # type: ignore[typeddict-item]
    assert rows == [{"text": "a", "image": image}, {"image": image}]
    assert split_batch({"text": [" "]}) == [{"text": " "}]  # refused by encode


def test_bad_use_is_told() -> None:
    with pytest.raises(ValueError, match=r"give path=, the folder of the checkpoint, or model="):
        MtebEncoder()
    with pytest.raises(ValueError, match=r"a batch with audio: expected text, image or both"):
        split_batch({"audio": []})  # type: ignore[typeddict-unknown-key,typeddict-item]
