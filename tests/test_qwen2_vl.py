"""Qwen2-VL, Qwen2.5-VL and Omni's thinker against PyTorch's on random models, and what is new."""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from hf_models import difference, picture
from PIL import Image
from qwen2_models import IMAGES, RECIPES, TEXTS, OldCase
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from e5v_jax.checkpoints.loading import abstract_model
from e5v_jax.dryrun.flops import traced_flops
from e5v_jax.encode.batching import plan_batches
from e5v_jax.families import architecture_of
from e5v_jax.families.base import BatchShape, Measured
from e5v_jax.families.qwen_vl import QWEN_VL
from e5v_jax.families.qwen_vl.patches import window_order
from e5v_jax.families.qwen_vl.positions import position_ids
from e5v_jax.families.qwen_vl.presets import ARCHITECTURES
from e5v_jax.families.qwen_vl.processor import QwenVLProcessor
from e5v_jax.families.qwen_vl.resize import smart_resize
from e5v_jax.families.qwen_vl.windows import window_attention
from e5v_jax.nn.layers import Build, Precision, l2_normalize
from e5v_jax.presets import E5_V, PRESETS
from e5v_jax.runtime import Runtime
from e5v_jax.sharding import make_mesh

ITEMS = [TEXTS[0], *IMAGES, {"text": "at night", "image": picture(20, 90)}, TEXTS[1]]
SHAPE = BatchShape(2, 128, 256)


def load(case: OldCase, items: list[Any]) -> list[Any]:
    processor = case.e5v.processor
    return [processor.load(item) for item in processor.measure(items, E5_V.choose())]


def embed(case: OldCase, batch: Any) -> np.ndarray:
    """fp32 [B, D], normalised, of the module alone."""
    return np.asarray(l2_normalize(jax.jit(case.module.encode)(batch)))


# --- whole models --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_embeddings_equal_torch(name: str, qwen2: Callable[[str], OldCase]) -> None:
    case = qwen2(name)
    theirs = case.torch_embed(ITEMS)
    assert (theirs @ theirs.T - np.eye(len(ITEMS))).max() < 0.999  # the items are told apart
    assert difference(case.e5v.encode(ITEMS), theirs) <= 1e-5


@pytest.mark.slow
def test_images_of_another_bucket(qwen2: Callable[[str], OldCase]) -> None:
    """Of more windows than the smallest bucket has: blocks that have others on both sides."""
    case = dataclasses.replace(qwen2("qwen2.5"), max_tokens=180)
    items = [picture(200, 250), picture(104, 96)]
    model = case.load()
    assert difference(model.encode(items), case.torch_embed(items)) <= 1e-5
    assert {shape.shape_key for shape in model.statistics.compilations} == {704}


def test_bf16(qwen2: Callable[[str], OldCase]) -> None:
    """Against PyTorch in fp32: the error is our rounding alone."""
    case, items = qwen2("qwen2.5"), [IMAGES[0], IMAGES[3], ITEMS[-2]]
    cosine = (case.load("bfloat16").encode(items) * case.torch_embed(items)).sum(axis=1)
    assert cosine.min() >= 0.999 and cosine.max() < 1 - 1e-6  # it did run in bf16


def test_vectors_do_not_depend_on_the_batch(qwen2: Callable[[str], OldCase]) -> None:
    """Nor on order, padding, or the bucket and length that an image is padded to."""
    case, items = qwen2("qwen2.5"), ITEMS[1:11]
    model = case.e5v
    together = model.encode(items)
    assert difference(model.encode(items[::-1], batch_size=1)[::-1], together) <= 1e-6
    loaded = load(case, items[:2])
    rows, shape = [loaded[1], None, loaded[0]], BatchShape(3, 160, 300)  # no whole blocks
    found = embed(case, model.processor.stack(rows, shape))
    assert np.isfinite(found).all()  # where there is no key to see, too
    assert difference(found[[2, 0]], together[:2]) <= 1e-6


# --- positions and pooling -----------------------------------------------------------------------


def test_positions_of_gme_count_up(qwen2: Callable[[str], OldCase]) -> None:
    """Its authors' way, images resized twice; with rows and columns the vectors are others."""
    preset = PRESETS["gme-qwen2-vl"]
    case = dataclasses.replace(
        qwen2("qwen2"), preset=preset.name, positions="1d", first_pixels=preset.first_pixels
    )
    model = case.load()
    items = [TEXTS[0], *IMAGES[:3], {"text": "at night", "image": IMAGES[3]}]
    head = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    tail = "<|im_end|>\n<|im_start|>assistant\n<|endoftext|>"
    prompts = [TEXTS[0], *["<image>"] * 3, "<image>at night"]
    images = [None, *IMAGES[:4]]

    def expected() -> np.ndarray:
        filled = [f"{head}{prompt}{tail}" for prompt in prompts]
        return np.stack([case.torch_vector(*pair) for pair in zip(filled, images, strict=True)])

    theirs = expected()
    assert difference(model.encode(items), theirs) <= 1e-5
    case.positions = "mrope"
    turned = np.abs(expected() - theirs).max(axis=1)
    assert turned[0] <= 1e-6 and turned[1:].min() > 1e-3


@pytest.mark.parametrize("name", ["qwen2", "qwen2.5", "omni"])
def test_position_ids_are_get_rope_index(name: str, qwen2: Callable[[str], OldCase]) -> None:
    rng, model = np.random.default_rng(0), qwen2(name).torch_model.model
    for _ in range(15):
        before, after, rows, columns = (int(n) for n in rng.integers(1, 12, 4))
        ids = [*[9] * (before - 1), 259, *[261] * (rows * columns), 260, *[9] * (after - 1)]
        tokens = torch.tensor([ids])
        grid = torch.tensor([[1, 2 * rows, 2 * columns]])
        kinds = () if name == "omni" else ((tokens == 261).int(),)
        expected, _ = model.get_rope_index(tokens, *kinds, image_grid_thw=grid)
        found = position_ids(len(ids), before, (rows, columns))
        np.testing.assert_array_equal(found, expected[:, 0].T)


def test_the_mean_of_all_tokens_or_of_the_image(qwen2: Callable[[str], OldCase]) -> None:
    """As jina-embeddings-v4 pools; trained with, it is the same."""
    case = dataclasses.replace(qwen2("qwen2.5"), preset="jina-embeddings-v4")
    model, items = case.load(), [*TEXTS, *IMAGES[:2]]
    start, end = "<|im_start|>user\n", "Describe the image.<|im_end|>\n"
    states = [case.torch_states(f"Passage: {text}") for text in TEXTS]
    for image in IMAGES[:2]:
        own = case.torch_states(f"{start}<image>{end}", image)
        before, after = (len(case.tokenizer(text)["input_ids"]) for text in (start, end))
        states.append(own[before : len(own) - after])  # the image's marks are in
    means = torch.stack([one.mean(0) for one in states])
    theirs = torch.nn.functional.normalize(means, dim=-1).numpy()
    assert difference(model.encode(items), theirs) <= 1e-5
    processor = model.processor
    loaded = [processor.load(item) for item in processor.measure(items, model.preset.choose())]
    batch = processor.stack(loaded[2:], SHAPE)
    trained = jax.jit(lambda b: l2_normalize(case.module(b, remat="full")))(batch)
    assert difference(np.asarray(trained), theirs[2:]) <= 1e-5


# --- blocks --------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen2", "qwen2.5", "odd", "omni"])
def test_blocks_equal_torch(name: str, qwen2: Callable[[str], OldCase]) -> None:
    """Order, embedding, each kind of attention, merger, tower: two images of a batch, padded."""
    case = qwen2(name)
    module, visual = case.module.visual, case.torch_model.model.visual
    cfg = case.e5v.config.vision
    side = cfg.factor
    images = [picture(3 * side, 9 * side), picture(5 * side, 4 * side)]
    theirs = [case.torch_image(image) for image in images]
    loaded = load(case, images)
    patches = case.e5v.processor.stack(loaded, SHAPE).patches
    place = jnp.asarray(patches.place, jnp.int32)
    second = jax.tree.map(lambda stack: stack[1], module.blocks)

    @jax.jit
    def run(patches: Any) -> Any:
        x = module.embed(patches.pixels, place, jnp.asarray(patches.grid))
        angles, seen = module.angles(place), module.seen(place)
        blocks = [second(x, angles, seen, jnp.asarray(is_full)) for is_full in (True, False)]
        return x, blocks, module.merger(x), module(patches)

    x, blocks, merged, (features, deep) = run(patches)
    assert deep is None
    for row, (pixels, thw) in enumerate(theirs):
        grid_thw, n = torch.tensor([thw]), len(pixels)
        order, windows = torch.arange(n // 4), None
        if cfg.window_size is not None:
            order, windows = get_vision_window_index(grid_thw, 2, cfg.window_size, cfg.patch_size)
        np.testing.assert_array_equal(loaded[row].image.order, order)

        def permuted(a: torch.Tensor, order: torch.Tensor = order) -> torch.Tensor:
            return a.reshape(len(order), 4, -1)[order].reshape(4 * len(order), -1)

        places = get_vision_position_ids(grid_thw, 2)
        np.testing.assert_array_equal(place[row, :n], permuted(places))
        h = permuted(visual.patch_embed(pixels))
        np.testing.assert_allclose(x[row, :n], h, atol=1e-5)
        turn = tuple(permuted(t) for t in visual.rotary_pos_emb(h, places))
        everywhere = torch.tensor([0, n], dtype=torch.int32)
        for found, bounds in zip(blocks, (everywhere, windows), strict=True):
            if bounds is not None:
                out = visual.blocks[1](h, cu_seqlens=bounds, position_embeddings=turn)
                np.testing.assert_allclose(found[row, :n], out, atol=3e-5)
        np.testing.assert_allclose(merged[row, : n // 4], visual.merger(h), atol=2e-5)
        whole = visual(pixels, grid_thw=grid_thw).pooler_output
        scale = float(whole.abs().max())
        np.testing.assert_allclose(features[row, : n // 4], whole[order], atol=1e-5 * scale)


def test_attention_in_windows() -> None:
    """Of random windows, against a mask over all; block sizes that do not divide the patches."""
    rng = np.random.default_rng(0)
    precision = Precision(jnp.float32, jnp.float32)
    for patches, size in ((13, 5), (40, 8), (3, 16)):
        lengths = rng.integers(1, size + 1, patches)
        window = np.repeat(np.arange(patches), lengths)[:patches]
        window = np.stack([window, np.where(np.arange(patches) < patches - 2, window, -1)])
        q, k, v = rng.normal(size=(3, 2, patches, 2, 4)).astype(np.float32)
        logits = np.einsum("bqnh,bknh->bnqk", q, k) / 2
        mask = window[:, None, :, None] == window[:, None, None, :]
        weights = np.exp(np.where(mask, logits, -np.inf))
        weights /= weights.sum(-1, keepdims=True)
        expected = np.einsum("bnqk,bknh->bqnh", weights, v)
        attend = jax.jit(partial(window_attention, size=size, precision=precision))
        found = attend(q, k, v, jnp.asarray(window, jnp.int32))
        real = window >= 0
        assert np.isfinite(np.asarray(found)).all()
        np.testing.assert_allclose(np.asarray(found)[real], expected[real], atol=1e-6)


def test_windows_matter(qwen2: Callable[[str], OldCase]) -> None:
    """Full attention in every block, or in none, gives other vectors of an image of 4 windows."""
    case = qwen2("qwen2.5")
    batch = case.e5v.processor.stack(load(case, IMAGES[:2]), SHAPE)
    found = []
    for blocks in ((1, 3), (), (0, 1, 2, 3)):
        graphdef, state = nnx.split(case.module.visual)
        tower = nnx.merge(graphdef, state)
        tower.cfg = dataclasses.replace(tower.cfg, fullatt_block_indexes=blocks)
        found.append(np.asarray(jax.jit(lambda b, tower=tower: tower(b)[0])(batch.patches)))
    for other in found[1:]:
        assert np.abs(other - found[0]).max(axis=(1, 2)).min() > 1e-2


def test_window_order() -> None:
    assert window_order((3, 3), 2).tolist() == [0, 1, 3, 4, 2, 5, 6, 7, 8]


# --- sizes, programs, checkpoints ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "plain", "gme"),
    [
        ((375, 500), (364, 504), 266),
        ((480, 640), (476, 644), 391),
        ((768, 1024), (756, 1036), 999),
        ((336, 336), (336, 336), 256),
        ((1080, 1920), (728, 1316), 1222),
        ((3024, 4032), (840, 1148), 1230),
        ((20, 20), (56, 56), 256),
    ],
)
def test_smart_resize(size: tuple[int, int], plain: tuple[int, int], gme: int) -> None:
    limits = {"factor": 28, "max_pixels": 1280 * 28**2}
    assert smart_resize(size, min_pixels=4 * 28**2, **limits) == plain
    height, width = smart_resize(size, min_pixels=256 * 28**2, **limits)
    assert height * width // 28**2 == gme


@pytest.mark.parametrize(
    ("name", "total", "folder"),
    [
        ("qwen2-vl-2b", 2_208_985_600, "gme-Qwen2-VL-2B-Instruct"),
        ("qwen2-vl-7b", 7_746_378_240, "gme-Qwen2-VL-7B-Instruct"),
        ("qwen2.5-vl-3b", 3_754_622_976, "Qwen2.5-VL-3B-Instruct"),
        ("qwen2.5-vl-7b", 8_292_166_656 - 152064 * 3584, "nomic-embed-multimodal-7b"),
    ],
)
def test_parameter_counts(name: str, total: int, folder: str) -> None:
    """Of the published checkpoints, without the head; and the folder that says the name."""
    rows = QWEN_VL.parameters(ARCHITECTURES[name]).rows
    sizes = {row.name: math.prod(row.shape) * (row.layers or 1) for row in rows if row.name}
    assert sum(sizes.values()) == total
    assert architecture_of(folder) == name


def test_flops_of_an_image_are_the_traced_ones() -> None:
    """Four of 32 blocks attend everywhere; in Qwen2-VL all do."""
    base = ARCHITECTURES["qwen2.5-vl-7b"]
    assert QWEN_VL.image_cost(base, 1, 3996, 2).flops / 1e12 == pytest.approx(5.41, rel=0.03)
    runtime = Runtime.on(make_mesh(1, 1, 1, devices=jax.devices()[:1]))
    build = Build(Precision(jnp.bfloat16, jnp.bfloat16), runtime)
    for config in (base, ARCHITECTURES["qwen2-vl-7b"]):
        graphdef, state = nnx.split(abstract_model(QWEN_VL, config, build).visual)
        batch = jax.eval_shape(
            lambda config=config: QWEN_VL.example_batch(config, BatchShape(2, 128, 4096)).patches
        )
        jaxpr = jax.make_jaxpr(jax.jit(lambda s, b, g=graphdef: nnx.merge(g, s)(b)))(state, batch)
        by_hand = QWEN_VL.image_cost(config, 2, 4096, 2).flops
        assert traced_flops(jaxpr) == pytest.approx(by_hand, rel=0.01)


@pytest.mark.parametrize("preset", ["lco-embedding", "gme-qwen2-vl"])
def test_programs_and_padding_of_photographs(
    preset: str, qwen2: Callable[[str], OldCase], shared: Path
) -> None:
    """500 photographs, as they are and made other sizes, and their captions: planned only."""
    case = qwen2("qwen2.5")
    vision = dataclasses.replace(ARCHITECTURES["qwen2.5-vl-7b"].vision, out_hidden_size=64)
    config = dataclasses.replace(case.e5v.config, vision=vision)
    processor = QwenVLProcessor(config, case.tokenizer, None, PRESETS[preset])
    rng = np.random.default_rng(0)
    sizes = [Image.open(file).size[::-1] for file in
             sorted((shared / "data/flickr8k/images").iterdir())] + [(224, 224)] * 100  # fmt: skip
    for side in np.exp(rng.uniform(np.log(200), np.log(2400), 200)):
        height, width = sizes[rng.integers(200)]
        scale = side / max(height, width)
        sizes.append((round(height * scale), round(width * scale)))
    items, patches = [], 0
    for i, size in enumerate(sizes):
        tokens, key = processor.measure_image(size)
        patches += 4 * tokens
        items.append(Measured(i, [1], tokens + 22, key))
    items += [Measured(i, [1], 20 + n, 0) for i, n in enumerate(rng.integers(6, 30, 500))]
    for max_tokens in (1024, 16384):
        options = {"max_rows": None, "max_tokens": max_tokens, "multiple": 1}
        batches = list(plan_batches(items, padded_length=processor.padded_length, **options))
        padded = sum(b.shape.rows * b.shape.shape_key for b in batches)
        shapes = {b.shape for b in batches}
        print(preset, max_tokens, len(shapes), 1 - patches / padded)
        assert 1 - patches / padded < 0.15
        assert len(shapes) <= 14
