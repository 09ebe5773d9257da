"""The projector that starts from the decoder's words: the regression, and that LLaVA's holds it."""

from pathlib import Path

import jax
import numpy as np
import pytest
from test_align import LORA, config, fill, flat, training_of

from e5v_jax.align.config import CaptionsConfig
from e5v_jax.align.words import caption_means, fit, start_from_words
from e5v_jax.checkpoints.converted import ConvertedFolder
from e5v_jax.checkpoints.loading import load_model
from e5v_jax.nn.layers import Build, Precision
from e5v_jax.runtime import Runtime
from e5v_jax.sharding import make_mesh

WIDTH, HIDDEN, IMAGES = 12, 32, 400


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill(tmp_path_factory.mktemp("words"))


def planted(seed: int) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Features [1, 4, WIDTH] of images, targets that are linear in their means, and that map."""
    random = np.random.default_rng(seed)
    features = [random.normal(3.0, 2.0, (1, 4, WIDTH)).astype(np.float32) for _ in range(IMAGES)]
    true = random.normal(0, 0.1, (WIDTH, HIDDEN))
    targets = np.stack([x.mean(axis=(0, 1)) @ true + 0.7 for x in features])
    return features, targets, true


def test_the_regression_finds_a_planted_map() -> None:
    features, targets, true = planted(0)
    embeddings = np.random.default_rng(1).normal(0.5, 0.3, (500, HIDDEN))
    found = fit(features, targets, embeddings, WIDTH)
    full = found.left @ found.right  # its size is set by the embeddings: compare the direction
    assert (full * true).sum() / np.linalg.norm(full) / np.linalg.norm(true) > 0.98
    patches = np.concatenate([x.reshape(-1, WIDTH) for x in features])
    out = patches @ found.left @ found.right + found.bias - found.centre @ found.right
    np.testing.assert_allclose(out.mean(axis=0), targets.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(out.std(axis=0).mean(), 0.3, rtol=0.05)
    # images of several tiles count by their patches: a pair of them in one is the same fit
    pairs = [np.concatenate(features[i : i + 2]) for i in range(0, IMAGES, 2)]
    merged = fit(pairs, targets[::2], embeddings, WIDTH)
    apart = fit(features, np.repeat(targets[::2], 2, axis=0), embeddings, WIDTH)
    np.testing.assert_allclose(merged.left @ merged.right, apart.left @ apart.right, atol=1e-9)
    assert fit(features, targets, embeddings, 3).left.shape == (WIDTH, 3)


def test_a_token_counts_by_how_few_captions_have_it() -> None:
    embeddings = np.eye(6)
    captions = [[[0, 1, 5], [0, 2, 5, 2]], [[0, 2, 5], [5, 0]], [[5, 0]]]
    means = caption_means(captions, embeddings)
    rare, common = np.log(5 / 1), np.log(5 / 2)
    expected = np.array([0, rare, common, 0, 0, 0]) / (rare + common)
    np.testing.assert_allclose(means[0], expected, atol=1e-12)
    np.testing.assert_allclose(means[1], np.eye(6)[2], atol=1e-12)
    np.testing.assert_array_equal(means[2], 0.0)  # nothing to tell it by


def test_the_projector_is_the_linear_map(folder: Path) -> None:
    """It equals the map on features that it has not seen, though there is a GELU in it."""
    base = ConvertedFolder(folder / "base")
    build = Build(Precision(*[np.dtype("float32")] * 2), Runtime.on(make_mesh(1, 1, 1)))
    model = load_model(base, build)
    projector = model.multi_modal_projector
    width = projector.linear_1.kernel[...].shape[0]
    random = np.random.default_rng(2)
    features = [random.normal(0, 2, (2, 4, width)).astype(np.float32) for _ in range(50)]
    captions = [[random.integers(3, 200, 6).tolist() for _ in range(2)] for _ in features]
    start_from_words(model, features, captions)
    embeddings = np.asarray(model.language_model.embed_tokens[...], np.float64)
    rank = projector.linear_1.kernel[...].shape[1] // 2
    found = fit(features, caption_means(captions, embeddings), embeddings, rank)
    new = random.normal(0, 3, (5, 4, width)).astype(np.float32)
    expected = (new @ found.left - found.centre) @ found.right + found.bias
    assert expected.std() > 1e-3
    np.testing.assert_allclose(np.asarray(projector(new)), expected, atol=1e-5)


@pytest.mark.parametrize("lora", [None, LORA], ids=["projector", "lora"])
def test_a_run_starts_from_it(folder: Path, tmp_path: Path, lora: object) -> None:
    """Each time the same one, another than the model's; then training changes it."""
    data = CaptionsConfig(path=(folder / "photos",), features=tmp_path / "features")
    cfg = config(folder, tmp_path / "out", data=data, projector_start="words", lora=lora)
    first, again = training_of(cfg), training_of(cfg)
    values = flat(again.trainable)
    for name, value in flat(first.trainable).items():
        np.testing.assert_array_equal(value, values[name], name)
    plain = training_of(config(folder, tmp_path / "out", data=data, lora=lora))
    losses = [
        float(x.step(next(x.feed.batches), jax.random.key(0)).loss) for x in (first, again, plain)
    ]
    assert losses[0] == losses[1] != losses[2]
    assert np.isfinite(losses).all()
