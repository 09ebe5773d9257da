"""Training on pairs with images: the same loss, the vectors that encode gives, whole runs."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hf_models import Case, Recipe, build_llava, picture
from training_runs import read_metrics

from e5v_jax.checkpoints import from_hf
from e5v_jax.data.pairs import load_pairs
from e5v_jax.data.text import truncate_texts
from e5v_jax.nn.layers import LoRAConfig, l2_normalize
from e5v_jax.runtime import Runtime
from e5v_jax.sharding import make_mesh
from e5v_jax.train.batches import tokenize_pairs
from e5v_jax.train.config import DataConfig, LossConfig, OptimizerConfig, TrainConfig
from e5v_jax.train.feed import Feed, open_feed, place
from e5v_jax.train.loop import train
from e5v_jax.train.step import PairBatch, embed_pairs, pair_loss, split_trainable

ROWS, BATCH = 9, 4
SIZES = [(30, 60), (60, 30), (28, 28), (10, 90), (50, 47)]  # several tilings


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    recipe = Recipe(text={"vocab_size": 280}, pinpoints=((1, 2), (2, 1), (1, 1)))
    return build_llava(recipe, tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for i in range(2 * ROWS):
        picture(*SIZES[i % len(SIZES)], seed=i).save(folder / f"{i}.png")
    return folder


def row(i: int) -> dict[str, str]:
    return {
        "sent0": f"dog {i} runs fast",
        "sent1": f"the dog {i} moves",
        "hard_neg": f"{i} cats",
        "image0": f"{i}.png",
        "image1": f"{ROWS + i}.png",
        "hard_neg_image": f"{(i + 1) % ROWS}.png",
    }


def write(folder: Path, columns: str, name: str = "pairs.jsonl") -> Path:
    """Rows with the given columns, beside the photographs."""
    chosen = columns.split()
    lines = [json.dumps({name: row(i)[name] for name in chosen}) for i in range(ROWS)]
    file = folder / name
    file.write_text("\n".join(lines) + "\n")
    return file


def feed_of(case: Case, file: Path, chunk_size: int | None = None) -> tuple[Feed, PairBatch]:
    """The feed of a run over ``file``, and its first batch on one device."""
    cfg = TrainConfig(
        model=case.folder,
        output=Path("unused"),
        data=DataConfig(path=(file,), length_groups=2),
        batch_size=BATCH,
        chunk_size=chunk_size,
    )
    mesh = make_mesh(data=-1, fsdp=1)
    feed = open_feed(cfg, load_pairs(file), case.e5v.processor, Runtime.on(mesh))
    batch = next(feed.batches)
    rows = [f"{file}:{i + 1}" for i in batch.rows]
    assert len(rows) == BATCH
    return feed, PairBatch(*place(batch.arrays, mesh))


COLUMNS = [
    "image0 sent1",
    "sent0 image0 image1",
    "image0 sent1 hard_neg_image",
    "sent0 sent1 image1 hard_neg",
]


@pytest.mark.parametrize("columns", COLUMNS)
def test_vectors_are_those_of_encode(case: Case, photos: Path, columns: str) -> None:
    """Every input of the batch, in its place, whatever group it went through."""
    file = write(photos, columns)
    feed, _ = feed_of(case, file)
    batch = next(feed.batches)
    placed = place(batch.arrays, make_mesh(data=-1, fsdp=1))
    found = embed_pairs(case.module, placed, chunk_size=None, remat="none", dropout_key=None)

    def item(i: int, text: str, image: str) -> object:
        has_text, has_image = (name in columns.split() for name in (text, image))
        # the test's tokenizer has no decoder, so that decoding changes the text
        words = truncate_texts(case.e5v.tokenizer, [row(i)[text]])[0]
        if has_text and has_image:
            return {"text": words, "image": photos / row(i)[image]}
        return photos / row(i)[image] if has_image else words

    sides = [("sent0", "image0"), ("sent1", "image1")]
    if "hard_neg" in columns:
        sides.append(("hard_neg", "hard_neg_image"))
    inputs = [item(i, text, image) for text, image in sides for i in batch.rows]
    expected = case.e5v.encode(inputs)
    assert feed.columns == len(sides) and feed.has_images
    np.testing.assert_allclose(l2_normalize(found), expected, atol=1e-5)
    assert np.abs(expected[0] - expected[1]).max() > 1e-2  # a wrong place would show


def test_gradient_caching_of_images(case: Case, photos: Path) -> None:
    """Two images with their tiles at a time: the gradient of all four."""
    file = write(photos, "image0 sent1")
    results = []
    for chunk_size in (None, 2):
        _, batch = feed_of(case, file, chunk_size)
        graphdef, trainable, frozen = split_trainable(case.module, lora=False)
        assert all(path[0] == "language_model" for path, _ in nnx.to_flat_state(trainable))

        def loss(
            trainable: nnx.State,
            batch: PairBatch = batch,
            chunk_size: int | None = chunk_size,
            graphdef: nnx.GraphDef = graphdef,
            frozen: nnx.State = frozen,
        ) -> jax.Array:
            return pair_loss(
                nnx.merge(graphdef, trainable, frozen),
                batch,
                columns=2,
                loss=LossConfig(temperature=0.5),
                chunk_size=chunk_size,
                remat="full",
                dropout_key=None,
            )[0]

        results.append(jax.jit(jax.value_and_grad(loss))(trainable))
    (whole, whole_grads), (chunked, chunked_grads) = results
    assert float(chunked) == pytest.approx(float(whole), rel=1e-6)
    norm = jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(whole_grads)))
    off = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), whole_grads, chunked_grads)
    assert max(float(x) for x in jax.tree.leaves(off)) <= 1e-6 * float(norm)


@pytest.mark.parametrize(
    "lora", [LoRAConfig(rank=2, alpha=4.0, dropout=0.1), pytest.param(None, marks=pytest.mark.slow)]
)
def test_run(case: Case, photos: Path, tmp_path: Path, lora: LoRAConfig | None) -> None:
    """A run learns from images and texts, with LoRA or all of the decoder; and resumes."""
    from_hf.convert(from_hf.Args(str(case.folder), tmp_path / "base"))
    cfg = TrainConfig(
        model=tmp_path / "base",
        output=tmp_path / "run",
        data=DataConfig(path=(write(photos, "sent0 image0 image1"),)),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=1),
        lora=lora,
        batch_size=BATCH,
        num_epochs=4,
        dtype="float32",
        log_every=1,
        checkpoint_every=4,
    )
    train(cfg)
    losses = [line["loss"] for line in read_metrics(tmp_path / "run")]
    assert len(losses) == 8 and np.mean(losses[-2:]) < np.mean(losses[:2])
    if lora is not None:
        (tmp_path / "run" / "checkpoints" / "8").rename(tmp_path / "moved")
        train(replace(cfg, resume=True))
        again = [line["loss"] for line in read_metrics(tmp_path / "run")]
        assert again[-4:] == losses[-4:]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"image0": "none.png"}, [":3: image0: ", "none.png: no such file"]),
        ({"image0": "pairs.jsonl"}, [":3: image0: ", "not an image"]),
        ({"image0": ""}, [":3: image0 is empty"]),
        ({"image0": 4}, [":3: image0 is 4, expected a string"]),
        ({"sent1": "half a \ud83d"}, [":3: sent1 has ", "lone surrogate"]),
        ({"image1": "1.png"}, [":3: ", "has a image1 and"]),
    ],
)
def test_bad_rows(case: Case, photos: Path, change: dict[str, object], expected: list[str]) -> None:
    """One line with file, row and column, before anything is decoded."""
    file = write(photos, "image0 sent1")
    lines = file.read_text().splitlines()
    lines[2] = json.dumps({**json.loads(lines[2]), **change})
    file.write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError) as info:
        feed_of(case, file)
    message = str(info.value)
    assert message.startswith(str(file)) and "\n" not in message
    for part in expected:
        assert part in message


def test_an_image_broken_behind_its_header(case: Case, photos: Path) -> None:
    """Found when its batch comes, and named."""
    file = write(photos, "image0 sent1")
    content = (photos / "0.png").read_bytes()
    (photos / "broken.png").write_bytes(content[: len(content) // 2])
    file.write_text(file.read_text().replace('"0.png"', '"broken.png"'))
    feed, _ = feed_of(case, write(photos, "image0 sent1", "whole.jsonl"))
    with pytest.raises(ValueError, match=r"pairs\.jsonl:1: .*broken\.png"):
        feed, _ = feed_of(case, file)
        for _ in feed.batches:
            pass
    assert feed.total_steps == 4


def test_chunks_must_divide_the_images(case: Case, photos: Path) -> None:
    with pytest.raises(ValueError, match="batch_size: 4 images of a step cannot be split into"):
        feed_of(case, write(photos, "image0 sent1"), chunk_size=3)


def test_a_sentence_makes_no_image(case: Case, photos: Path) -> None:
    """Each input has one placeholder for an image of its own, whatever its sentence says."""
    file = write(photos, "sent0 image0 sent1", "forged.jsonl")
    file.write_text(file.read_text().replace("dog", "<image> </s>"))
    first, second = tokenize_pairs(
        load_pairs(file), case.e5v.processor, DataConfig(path=(file,), max_tokens=999)
    ).items
    token, end = case.e5v.config.image_token_id, case.e5v.tokenizer.eos_token_id
    assert [item.ids.count(token) for item in first] == ROWS * [1]
    assert not any(token in item.ids for item in second)
    assert {item.ids.count(end) for item in (*first, *second)} == {0}
    assert min(item.length for item in second) > len("the <image> </s> 0 moves")
