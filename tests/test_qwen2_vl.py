"""Qwen2-VL, Qwen2.5-VL and Omni's thinker against PyTorch's on random models, and what is new."""

import copy
import dataclasses
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
from flax import nnx
from hf_models import picture
from PIL import Image
from qwen2_models import RECIPES, OldCase, build_old
from qwen_models import QwenRecipe
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from e5v_jax import E5V
from e5v_jax.checkpoints.from_hf import Args, convert
from e5v_jax.checkpoints.hf_source import open_source
from e5v_jax.checkpoints.loading import abstract_model
from e5v_jax.checkpoints.to_hf import Args as ExportArgs
from e5v_jax.checkpoints.to_hf import convert as export
from e5v_jax.dryrun.flops import traced_flops
from e5v_jax.encode.batching import plan_batches
from e5v_jax.families import architecture_of, find_family
from e5v_jax.families.base import BatchShape, Measured
from e5v_jax.families.qwen_vl import QWEN_VL, layouts, vision_config
from e5v_jax.families.qwen_vl.patches import cut_patches, window_order
from e5v_jax.families.qwen_vl.positions import position_ids
from e5v_jax.families.qwen_vl.presets import ARCHITECTURES
from e5v_jax.families.qwen_vl.processor import OLD_PATCH_BUCKETS, QwenVLProcessor
from e5v_jax.families.qwen_vl.resize import smart_resize
from e5v_jax.families.qwen_vl.windows import window_attention
from e5v_jax.nn.config import UnsupportedModelError
from e5v_jax.nn.layers import Build, Precision, l2_normalize
from e5v_jax.presets import E5_V, PRESETS, find_preset
from e5v_jax.runtime import Runtime
from e5v_jax.sharding import make_mesh

TEXTS = ["A dog sits.", "Fußball 🎉!"]
IMAGES: list[Any] = [
    picture(70, 45),  # portrait, 9 x 6 tokens of 8 pixels: windows of 4 x 4 are cut off
    picture(40, 56),
    picture(32, 64),  # two whole windows
    picture(6, 200),  # thin, and less than the least
    picture(400, 2),  # 200 to 1
    picture(1, 1),
    picture(3, 100),
    picture(100, 90),  # larger than the cap of 50 tokens
    picture(33, 31, 2),
]
ITEMS = [TEXTS[0], *IMAGES, {"text": "at night", "image": picture(20, 90)}, TEXTS[1]]
MAX_TOKENS = 50  # all images in the smallest bucket: one program
SHAPE = BatchShape(2, 128, 256)


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], OldCase]:
    """Random tiny models by name; images have at most MAX_TOKENS tokens."""

    @cache
    def make(name: str) -> OldCase:
        case = build_old(RECIPES[name], tmp_path_factory.mktemp(name))
        case.max_tokens = MAX_TOKENS
        return case

    return make


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    assert ours.shape == theirs.shape and ours.dtype == np.float32
    return float(np.abs(ours - theirs).max())


def load(case: OldCase, items: list[Any]) -> list[Any]:
    processor = case.e5v.processor
    return [processor.load(item) for item in processor.measure(items, E5_V.choose())]


def embed(case: OldCase, batch: Any) -> np.ndarray:
    """fp32 [B, D], normalised, of the module alone."""
    return np.asarray(l2_normalize(jax.jit(case.module.encode)(batch)))


# --- whole models --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_embeddings_equal_torch(name: str, old: Callable[[str], OldCase]) -> None:
    case = old(name)
    theirs = case.torch_embed(ITEMS)
    assert (theirs @ theirs.T - np.eye(len(ITEMS))).max() < 0.999  # the items are told apart
    assert difference(case.e5v.encode(ITEMS), theirs) <= 1e-5


@pytest.mark.slow
def test_images_of_another_bucket(old: Callable[[str], OldCase]) -> None:
    """Of more windows than the smallest bucket has: blocks that have others on both sides."""
    case = dataclasses.replace(old("qwen2.5"), max_tokens=180)
    items = [picture(200, 250), picture(104, 96)]
    model = case.load()
    assert difference(model.encode(items), case.torch_embed(items)) <= 1e-5
    assert {shape.shape_key for shape in model.statistics.compilations} == {704}


def test_bf16(old: Callable[[str], OldCase]) -> None:
    """Against PyTorch in fp32: the error is our rounding alone."""
    case, items = old("qwen2.5"), [IMAGES[0], IMAGES[3], ITEMS[-2]]
    cosine = (case.load("bfloat16").encode(items) * case.torch_embed(items)).sum(axis=1)
    assert cosine.min() >= 0.999 and cosine.max() < 1 - 1e-6  # it did run in bf16


def test_vectors_do_not_depend_on_the_batch(old: Callable[[str], OldCase]) -> None:
    """Nor on order, padding, or the bucket and length that an image is padded to."""
    case, items = old("qwen2.5"), ITEMS[1:11]
    model = case.e5v
    together = model.encode(items)
    assert difference(model.encode(items[::-1], batch_size=1)[::-1], together) <= 1e-6
    loaded = load(case, items[:2])
    rows, shape = [loaded[1], None, loaded[0]], BatchShape(3, 160, 300)  # no whole blocks
    found = embed(case, model.processor.stack(rows, shape))
    assert np.isfinite(found).all()  # where there is no key to see, too
    assert difference(found[[2, 0]], together[:2]) <= 1e-6


# --- positions and pooling -----------------------------------------------------------------------


def test_positions_of_gme_count_up(old: Callable[[str], OldCase]) -> None:
    """Its authors' way, images resized twice; with rows and columns the vectors are others."""
    preset = PRESETS["gme-qwen2-vl"]
    case = dataclasses.replace(
        old("qwen2"), preset=preset.name, positions="1d", first_pixels=preset.first_pixels
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
def test_position_ids_are_get_rope_index(name: str, old: Callable[[str], OldCase]) -> None:
    rng, model = np.random.default_rng(0), old(name).torch_model.model
    for _ in range(15):
        before, after, rows, columns = (int(n) for n in rng.integers(1, 12, 4))
        ids = [*[9] * (before - 1), 259, *[261] * (rows * columns), 260, *[9] * (after - 1)]
        tokens = torch.tensor([ids])
        grid = torch.tensor([[1, 2 * rows, 2 * columns]])
        kinds = () if name == "omni" else ((tokens == 261).int(),)
        expected, _ = model.get_rope_index(tokens, *kinds, image_grid_thw=grid)
        found = position_ids(len(ids), before, (rows, columns))
        np.testing.assert_array_equal(found, expected[:, 0].T)


def test_the_mean_of_all_tokens_or_of_the_image(old: Callable[[str], OldCase]) -> None:
    """As jina-embeddings-v4 pools; trained with, it is the same."""
    case = dataclasses.replace(old("qwen2.5"), preset="jina-embeddings-v4")
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
def test_blocks_equal_torch(name: str, old: Callable[[str], OldCase]) -> None:
    """Order, embedding, each kind of attention, merger, tower: two images of a batch, padded."""
    case = old(name)
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


def test_windows_matter(old: Callable[[str], OldCase]) -> None:
    """Full attention in every block, or in none, gives other vectors of an image of 4 windows."""
    case = old("qwen2.5")
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
    preset: str, old: Callable[[str], OldCase], shared: Path
) -> None:
    """500 photographs, as they are and made other sizes, and their captions: planned only."""
    case = old("qwen2.5")
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


@pytest.mark.parametrize("name", RECIPES)
def test_there_and_back_again(name: str, old: Callable[[str], OldCase], tmp_path: Path) -> None:
    """Converted and exported to the same bits; of Omni's thinker all but its ears."""
    case = old(name)
    convert(Args(str(case.folder), tmp_path / "ours"))
    if name == "omni":
        limits = {"min_pixels": 4 * 64, "max_pixels": MAX_TOKENS * 64}
        model = E5V.from_pretrained(tmp_path / "ours", dtype="float32", **limits)
        assert model.config == case.e5v.config
        assert difference(model.encode(ITEMS[:3]), case.e5v.encode(ITEMS[:3])) <= 1e-6
    export(ExportArgs(tmp_path / "ours", tmp_path / "theirs"))
    before = safetensors.numpy.load_file(case.folder / "model.safetensors")
    after = safetensors.numpy.load_file(tmp_path / "theirs" / "model.safetensors")
    before = {key: x for key, x in before.items() if not key.startswith("audio_tower.")}
    assert before.keys() == after.keys()
    for key, array in before.items():
        np.testing.assert_array_equal(after[key], array, err_msg=key, strict=True)
    files = [json.loads((folder / "config.json").read_text()) for folder in
             (case.folder, tmp_path / "theirs")]  # fmt: skip
    assert files[0] == files[1]


def rewritten(case: OldCase, folder: Path, raw: dict[str, Any], start: str = "") -> Path:
    """The case's weights, their names begun otherwise, with another configuration."""
    tensors = safetensors.numpy.load_file(case.folder / "model.safetensors")
    if start:
        tensors = {start + key: array for key, array in tensors.items()}
        tensors |= {f"{part}.a.weight": np.zeros(2) for part in ("talker", "token2wav")}
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


@pytest.mark.parametrize("name", ["qwen2", "qwen2.5"])
def test_files_of_the_hub(name: str, old: Callable[[str], OldCase], tmp_path: Path) -> None:
    """Their decoder's fields stand at the top, and some have other names."""
    case = old(name)
    raw = json.loads((case.folder / "config.json").read_text())
    text, vision = raw.pop("text_config"), raw["vision_config"]
    rope = text.pop("rope_parameters")
    for key in ("model_type", "layer_types", "pad_token_id"):
        text.pop(key)
    for key in ("in_channels", "rope_parameters", "dtype"):
        vision.pop(key, None)
    vision |= {"in_chans": 3, "spatial_patch_size": 4, "model_type": raw["model_type"]}
    raw |= {**text, "vision_token_id": 263, "sliding_window": 32768, "rope_theta": 50000.0}
    raw["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    source = open_source(rewritten(case, tmp_path, raw))
    assert source.config == case.e5v.config


def test_all_of_omni(old: Callable[[str], OldCase], tmp_path: Path) -> None:
    """Its thinker is found by its names; what speaks is left out."""
    case = old("omni")
    thinker = json.loads((case.folder / "config.json").read_text())
    raw = {"model_type": "qwen2_5_omni", "thinker_config": thinker, "talker_config": {},
           "token2wav_config": {}, "enable_audio_output": True}  # fmt: skip
    source, expected = open_source(rewritten(case, tmp_path, raw, "thinker.")), None
    expected = open_source(case.folder)
    assert source.config == expected.config
    names = list(expected.shapes())
    for name, ours, theirs in zip(names, source.read(names), expected.read(names), strict=True):
        np.testing.assert_array_equal(ours, theirs, err_msg=name)
    assert find_family(raw).hf_config(raw, source.config) == thinker


# --- jina-embeddings-v4's own repository ----------------------------------------------------------

TASKS = ("retrieval", "text-matching", "code")
JINA = {
    "architectures": ["JinaEmbeddingsV4Model"],
    "auto_map": {"AutoModel": "modeling_jina_embeddings_v4.JinaEmbeddingsV4Model"},
    "single_vector_pool_strategy": "mean",
    "multi_vector_projector_dim": 8,
    "matryoshka_dims": [16, 32, 64],
    "task_names": list(TASKS),
    "truncate_dim": None,
    "_attn_implementation": "sdpa",
}
PROJECTIONS = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)
RANK, ALPHA = 4, 6


def jina_factors(case: OldCase) -> dict[str, np.ndarray]:
    """By the keys of adapter_model.safetensors, whose header public code has written down."""
    rng, found = np.random.default_rng(5), {}
    layers = case.torch_model.model.language_model.layers
    for i, projection, task in itertools.product(range(len(layers)), PROJECTIONS, TASKS):
        rows, columns = layers[i].get_submodule(projection).weight.shape
        start = f"base_model.model.model.language_model.layers.{i}.{projection}"
        for factor, shape in (("A", (RANK, columns)), ("B", (rows, RANK))):
            array = rng.standard_normal(shape).astype(np.float32) * 0.1
            found[f"{start}.lora_{factor}.{task}.weight"] = array
    for task, (factor, shape) in itertools.product(
        TASKS, {"A": (RANK, 64), "B": (8, RANK)}.items()
    ):
        key = f"base_model.model.multi_vector_projector.lora_{factor}.{task}.weight"
        found[key] = np.ones(shape, np.float32)
    return found


@pytest.fixture(scope="module")
def jina(old: Callable[[str], OldCase], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in that layout: the decoder's fields twice, no model_type, three adapters."""
    case, folder = old("qwen2.5"), tmp_path_factory.mktemp("jina")
    raw = json.loads((case.folder / "config.json").read_text())
    text = raw["text_config"]
    rope = text.pop("rope_parameters")
    text["rope_scaling"] = {"type": "default", "rope_type": "default",
                            "mrope_section": rope["mrope_section"]}  # fmt: skip
    text["rope_theta"] = rope["rope_theta"]
    copies = {name: x for name, x in text.items() if name not in ("model_type", "vocab_size")}
    del raw["model_type"]
    (folder / "config.json").write_text(json.dumps({**copies, **raw, **JINA}))
    tensors = safetensors.numpy.load_file(case.folder / "model.safetensors")
    tensors["multi_vector_projector.weight"] = np.ones((8, 64), np.float32)
    tensors["multi_vector_projector.bias"] = np.ones(8, np.float32)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for file in case.folder.glob("*token*"):
        (folder / file.name).symlink_to(file)
    (folder / "adapters").mkdir()
    factors = jina_factors(case)
    safetensors.numpy.save_file(factors, folder / "adapters" / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "FEATURE_EXTRACTION",
        "r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.1,
        "target_modules": "(.*(model).*(down_proj|gate_proj|up_proj|k_proj|q_proj|v_proj|o_proj).*$"
        "|.*(single_vector_projector|multi_vector_projector).*$)",
        "exclude_modules": ".*visual.*",
    }
    (folder / "adapters" / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("task", TASKS)
def test_jina_equals_torch(
    task: str, jina: Path, old: Callable[[str], OldCase], tmp_path: Path
) -> None:
    """One adapter by the preset, the mean of states; with its prompts and without its projector."""
    case = old("qwen2.5")
    merged = copy.deepcopy(case.torch_model)
    factors = {name: torch.tensor(array) for name, array in jina_factors(case).items()}
    for i, layer in enumerate(merged.model.language_model.layers):
        for projection in PROJECTIONS:
            start = f"base_model.model.model.language_model.layers.{i}.{projection}"
            a, b = (factors[f"{start}.lora_{factor}.{task}.weight"] for factor in "AB")
            layer.get_submodule(projection).weight.data += ALPHA / RANK * b @ a
    case, image = dataclasses.replace(case, torch_model=merged), IMAGES[0]
    start, end = "<|im_start|>user\n", "Describe the image.<|im_end|>\n"
    own = case.torch_states(f"{start}<image>{end}", image)
    before, after = (len(case.tokenizer(text)["input_ids"]) for text in (start, end))
    said = "Query" if task == "text-matching" else "Passage"
    states = [case.torch_states(f"{said}: {TEXTS[0]}"), own[before : len(own) - after]]
    means = torch.stack([one.mean(0) for one in states])
    theirs = torch.nn.functional.normalize(means, dim=-1).numpy()
    name = None if task == "retrieval" else f"jina-embeddings-v4-{task}"
    limits = {"min_pixels": 4 * 64, "max_pixels": MAX_TOKENS * 64}
    model = E5V.from_pretrained(jina, dtype="float32", preset=name, **limits)
    assert model.preset.adapter == task
    assert difference(model.encode([TEXTS[0], image]), theirs) <= 1e-5
    if task == "code":  # converted, the folder keeps all three, and the preset that was told
        convert(Args(src=str(jina), dst=tmp_path / "ours", preset=name))
        again = E5V.from_pretrained(tmp_path / "ours", dtype="float32", **limits)
        assert again.preset.name == name
        assert difference(again.encode(TEXTS[:1]), theirs[:1]) <= 1e-5
        export(ExportArgs(tmp_path / "ours", tmp_path / "theirs"))
        raw = json.loads((tmp_path / "theirs" / "config.json").read_text())
        assert raw["architectures"] == ["Qwen2_5_VLForConditionalGeneration"]
        assert raw["model_type"] == "qwen2_5_vl" and not raw.keys() & (
            JINA.keys() - {"architectures", "_attn_implementation"}
        )
        exported = open_source(tmp_path / "theirs")
        weights = dict(merged.model.language_model.named_parameters())
        row = "language_model.layers.1.mlp.up_proj.kernel"
        (found,) = exported.read([row])
        np.testing.assert_allclose(
            found.T, weights["layers.1.mlp.up_proj.weight"].detach(), atol=1e-6
        )
    if task == "retrieval":
        convert(Args(src=str(jina), dst=tmp_path / "merged", merge=True))
        again = E5V.from_pretrained(tmp_path / "merged", dtype="float32", **limits)
        assert not (tmp_path / "merged" / "adapter").exists()
        assert difference(again.encode(TEXTS[:1]), theirs[:1]) <= 1e-5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"truncate_dim": 16}, "truncate_dim is 16: only None is supported"),
        (
            {"single_vector_pool_strategy": "last"},
            "single_vector_pool_strategy is 'last': only 'mean'",
        ),
        (
            {"single_vector_projector_dim": 16},
            "single_vector_projector_dim is 16: this field is not",
        ),
        ({"hidden_size": 32}, "hidden_size is 32, but text_config has 64: make them agree"),
        ({"rope_theta": 5.0}, "rope_theta is 5.0, but text_config has 50000.0: make them agree"),
        ({"model_type": "jina_embeddings_v4"}, "unsupported architecture 'JinaEmbeddingsV4Model'"),
    ],
)
def test_jina_configurations_that_are_refused(
    changes: dict[str, Any], message: str, jina: Path, tmp_path: Path
) -> None:
    raw = {**json.loads((jina / "config.json").read_text()), **changes}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    (tmp_path / "model.safetensors").symlink_to(jina / "model.safetensors")
    with pytest.raises(UnsupportedModelError) as error:
        open_source(tmp_path)
    assert str(error.value).startswith(f"{tmp_path}/config.json: {message}")


def test_adapters_of_jina_that_are_not_told(jina: Path, tmp_path: Path) -> None:
    """Another preset has no say in which of them is taken; and they must be there."""
    with pytest.raises(ValueError, match=r"by name \(code, retrieval, text-matching\): choose"):
        E5V.from_pretrained(jina, preset="e5-v")
    for file in jina.iterdir():
        if file.name != "adapters":
            (tmp_path / file.name).symlink_to(file)
    with pytest.raises(FileNotFoundError, match=f"^{tmp_path}/adapters: neither a PEFT adapter"):
        E5V.from_pretrained(tmp_path)


# --- what is refused -----------------------------------------------------------------------------

CONFIGS: list[tuple[str, dict[str, Any], str]] = [
    ("qwen2", {"vision_config.embed_dim": 44}, "not a multiple of num_heads 3"),
    ("qwen2", {"vision_config.window_size": 112}, "window_size is 112: this field is not known"),
    ("qwen2", {"vision_config.intermediate_size": 9}, "intermediate_size is 9: this field is"),
    ("qwen2", {"vision_config.mlp_ratio": 2}, "blocks.0.mlp.fc1.bias"),
    ("qwen2", {"vision_config.hidden_act": "gelu"}, "hidden_act 'gelu': only 'quick_gelu'"),
    ("qwen2", {"vision_config.spatial_patch_size": 5}, "spatial_patch_size is 5: only 4"),
    ("qwen2", {"vision_config.in_chans": 1}, "in_chans is 1: only 3"),
    ("qwen2.5", {"vision_config.window_size": 7}, "window_size is 7: expected at least the 8"),
    ("qwen2.5", {"vision_config.window_size": None}, "window_size"),
    ("qwen2.5", {"vision_config.fullatt_block_indexes": [0, 4]}, "expected blocks from 0 to 3"),
    ("qwen2.5", {"vision_config.hidden_act": "gelu"}, "hidden_act 'gelu': only 'silu'"),
    ("qwen2.5", {"vision_config.deepstack_visual_indexes": [0]}, "this field is not known"),
    ("qwen2.5", {"vision_config.depth": 3, "vision_config.fullatt_block_indexes": [1]},
     "visual.blocks.3.attn.proj.bias: one too many"),
    ("qwen2.5", {"text_config": 3}, "text_config is 3: expected an object"),
    ("qwen2.5", {"is_causal": False}, "is_causal is False: this field is not known"),
    ("qwen2.5", {"model_type": "qwen2_5_vl_moe"}, "model_type 'qwen2_5_vl_moe'"),
    ("omni", {"user_token": 3}, "user_token is 3: this field is not known"),
    ("omni", {"vision_start_token_id": None}, "vision_start_token_id is None: expected the id"),
    ("omni", {"model_type": "qwen2_5_omni"}, "is not known"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "message"), CONFIGS)
def test_configurations_that_are_refused(
    name: str,
    changes: dict[str, Any],
    message: str,
    old: Callable[[str], OldCase],
    tmp_path: Path,
) -> None:
    case = old(name)
    raw = json.loads((case.folder / "config.json").read_text())
    for path, value in changes.items():
        section, _, field = path.rpartition(".")
        (raw[section] if section else raw)[field] = value
    (tmp_path / "config.json").write_text(json.dumps(raw))
    (tmp_path / "model.safetensors").symlink_to(case.folder / "model.safetensors")
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        open_source(tmp_path)
    assert "\n" not in str(error.value)


LISTED = {*layouts._NOT_NEEDED, *layouts._OMNI_NOT_NEEDED, *vision_config._NOT_NEEDED}
TOGETHER = {"use_sliding_window", "sliding_window", "max_window_layers"}  # none alone says a window
# What a message about a field may name in its place: what follows from it.
FOLLOWS = {
    "num_attention_heads": "head_dim",
    "hidden_size": "head",
    "embed_dim": "out_hidden_size",
    "rope_theta": "rope",
    "depth": "fullatt_block_indexes",
    "model_type": "unsupported architecture 'another'",
}


def changed(value: Any) -> Any:
    """Another value of the same kind."""
    match value:
        case bool():
            return not value
        case int() | float():
            return 2 * value
        case list():
            return value[:-1]
        case dict():
            return {"0": "a", "1": "b"}
        case None:
            return 7
    return "another"


def parts_of(raw: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every object in a configuration that has fields to change, by its dotted name."""
    yield "", raw
    for name, value in raw.items():
        if isinstance(value, dict) and name not in ("id2label", "label2id", "audio_config"):
            yield from ((f"{name}.{part}".rstrip("."), x) for part, x in parts_of(value))


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl", "qwen2_5_omni_thinker", "qwen3_vl"])
def test_no_field_is_ignored_in_silence(kind: str) -> None:
    """Each that transformers' class has, changed alone, is followed, refused by name or listed."""
    recipes = {recipe.kind: recipe for recipe in reversed(RECIPES.values())}
    hf = recipes[kind].config() if kind in recipes else QwenRecipe().config()
    saved, full = json.loads(hf.to_json_string()), json.loads(json.dumps(hf.to_dict()))

    def read(raw: dict[str, Any]) -> Any:
        return find_family(raw).read_config(raw)

    usual, outcomes = read(saved), Counter()
    for part, fields in parts_of(full):
        for name, value in fields.items():
            if isinstance(value, dict) and name not in ("id2label", "label2id"):
                continue
            raw = copy.deepcopy(saved)
            place = raw
            for key in filter(None, part.split(".")):
                place = place.setdefault(key, {})
            place[name] = changed(value)
            where = f"{part}.{name}".lstrip(".")
            try:
                same = read(raw) == usual
            except Exception as error:  # of transformers, many types
                assert name in str(error) or FOLLOWS.get(name, "?") in str(error), (where, error)
                outcomes["refused"] += 1
                continue
            listed = {
                *LISTED,
                *TOGETHER,
                *(layouts._TEXT_NOT_NEEDED if "vision" not in part else ()),
            }
            listed -= set() if part else set(layouts.TOKENS)
            assert not same or name in listed, where
            outcomes["listed" if same else "followed"] += 1
    print(kind, dict(outcomes))
    assert min(outcomes[name] for name in ("refused", "followed", "listed")) >= 10
    for part in ("", "text_config.", "vision_config."):
        raw = copy.deepcopy(saved)
        (raw[part[:-1]] if part else raw)["new"] = 3
        with pytest.raises(
            UnsupportedModelError, match=f"^{part}new is 3: this field is not known"
        ):
            read(raw)
    if kind != "qwen3_vl":
        raw = copy.deepcopy(saved)
        raw["text_config"] |= {"use_sliding_window": True, "sliding_window": 9, "layer_types": None,
                               "max_window_layers": 0}  # fmt: skip
        assert read(raw).text.sliding_window == 9


def test_moca_is_refused_by_its_name() -> None:
    """Nothing in its files says that its attention is not causal."""
    with pytest.raises(ValueError, match=r"^MoCa-Qwen25VL-3B: its tokens see those after them"):
        find_preset(None, "moca-embed/MoCa-Qwen25VL-3B")


def test_image_processors(old: Callable[[str], OldCase]) -> None:
    """CLIP's mean and deviation, also where the file leaves them out."""
    config = old("qwen2").e5v.config
    settings: dict[str, Any] = {
        "min_pixels": 3136,
        "max_pixels": 12845056,
        "patch_size": 4,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "processor_class": "Qwen2VLProcessor",
        "image_processor_type": "Qwen2VLImageProcessor",
    }
    config = QWEN_VL.match_preprocessor(config, settings)
    assert (config.min_pixels, config.max_pixels) == (3136, 12845056)
    QWEN_VL.check_preprocessor(config, settings)
    mean = [0.48145466, 0.4578275, 0.40821073]
    QWEN_VL.check_preprocessor(config, {**settings, "image_mean": mean})
    with pytest.raises(UnsupportedModelError, match="image_mean is"):
        QWEN_VL.check_preprocessor(config, {**settings, "image_mean": [0.5] * 3})


def with_files(case: OldCase, folder: Path, files: dict[str, Any]) -> Path:
    """The model of ``case`` with other files of an image processor."""
    folder.mkdir()
    for file in case.folder.iterdir():
        (folder / file.name).symlink_to(file)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


SETTINGS = {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 4}
SIZE = {"shortest_edge": 700, "longest_edge": 9000}
SPELLINGS: dict[str, dict[str, Any]] = {
    "size": {"size": SIZE},
    "pixels": {"min_pixels": 700, "max_pixels": 9000},
    "both": {
        "size": {"shortest_edge": 1, "longest_edge": 2},
        "min_pixels": 700,
        "max_pixels": 9000,
    },
    "one": {"size": SIZE, "min_pixels": 900, "max_pixels": None},
    "half": {"max_pixels": 5000},  # the other is that of the class
    "none": {},
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_limits_are_those_of_the_folder(
    spelling: str, old: Callable[[str], OldCase], tmp_path: Path
) -> None:
    """As transformers' processor has them, in each of its two files; converted, they stay."""
    case, settings = old("qwen2"), {**SETTINGS, **SPELLINGS[spelling]}
    theirs = Qwen2VLImageProcessorPil(**json.loads(json.dumps(settings)))
    sizes = [(10, 12), (20, 33), (50, 81), (300, 100), (99, 98), (320, 340)]
    expected = [theirs.get_number_of_image_patches(*size) // 4 for size in sizes]
    first = with_files(case, tmp_path / "4", {"preprocessor_config": settings})
    second = {"image_processor": settings, "processor_class": "Qwen2VLProcessor"}
    folders = [first, with_files(case, tmp_path / "5", {"processor_config": second})]
    if spelling == "one":
        convert(Args(src=str(first), dst=tmp_path / "converted"))
        (tmp_path / "without").mkdir()
        for file in (tmp_path / "converted").iterdir():
            if file.name != "preprocessor_config.json":
                (tmp_path / "without" / file.name).symlink_to(file)
        folders += [tmp_path / "converted", tmp_path / "without"]
    for folder in folders:
        processor = E5V.load_processor(folder)
        assert [processor.measure_image(size)[0] for size in sizes] == expected, folder


def test_what_goes_before_the_limits_of_the_folder(
    old: Callable[[str], OldCase], tmp_path: Path
) -> None:
    """An option, then a preset that states its own; each limit alone."""
    settings = {**SETTINGS, "min_pixels": 64 * 20, "max_pixels": 64 * 100}
    folder = with_files(old("qwen2"), tmp_path / "a", {"preprocessor_config": settings})

    def tokens(side: int, **options: Any) -> int:
        processor = E5V.load_processor(folder, **options)
        found: int = processor.measure_image((side, side))[0]
        return found

    assert (tokens(8), tokens(400)) == (25, 100)
    assert (tokens(8, min_pixels=64 * 36), tokens(400, min_pixels=64 * 36)) == (36, 100)
    assert (tokens(8, max_pixels=64 * 49), tokens(400, max_pixels=64 * 49)) == (25, 49)
    assert (tokens(30, preset="vlm2vec-v2.0"), tokens(200, preset="vlm2vec-v2.0")) == (49, 625)
    with pytest.raises(ValueError, match=r"^min_pixels 9000: expected at most max_pixels, 6400$"):
        tokens(8, min_pixels=9000)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"preprocessor_config": {"min_pixels": 0}},
            "min_pixels is 0: expected a number of pixels",
        ),
        ({"preprocessor_config": {"max_pixels": 64.0}}, "max_pixels is 64.0: expected a number"),
        ({"preprocessor_config": {"max_pixels": True}}, "max_pixels is True: expected a number"),
        ({"preprocessor_config": {"size": 224}}, "size is 224: expected an object"),
        (
            {"preprocessor_config": {"size": {"shortest_edge": 9}}},
            "size.longest_edge is None: expected a number of pixels",
        ),
        (
            {"preprocessor_config": {"size": {"min_pixels": 9, "max_pixels": 99}}},
            "size.shortest_edge is None: expected a number of pixels",
        ),
        (
            {"preprocessor_config": {"size": SIZE, "max_pixels": 600}},
            "size.shortest_edge is 700: expected at most max_pixels, 600",
        ),
        (
            {"preprocessor_config": {"size": SIZE}, "processor_config": {"image_processor": {}}},
            "size, min_pixels and max_pixels say 700 to 9000 pixels, where the folder's other file "
            "or its conversion has 3136 to 1003520",
        ),
    ],
)
def test_limits_that_cannot_be(
    files: dict[str, dict[str, Any]], message: str, old: Callable[[str], OldCase], tmp_path: Path
) -> None:
    """One line that names file and key."""
    full = {
        name: {"image_processor": SETTINGS} if name == "processor_config" else {**SETTINGS, **given}
        for name, given in files.items()
    }
    folder = with_files(old("qwen2"), tmp_path / "a", full)
    with pytest.raises(UnsupportedModelError) as error:
        open_source(folder)
    assert str(error.value).startswith(f"{folder}/preprocessor_config.json: {message}")
    assert "\n" not in str(error.value)


def test_limits_of_an_image(old: Callable[[str], OldCase]) -> None:
    """As transformers has them, unless the folder, a preset or the caller says otherwise."""
    case = old("qwen2")
    assert E5V.load_processor(case.folder).measure_image((800, 800)) == (35**2, 5120)
    processor = E5V.load_processor(case.folder, max_pixels=10**6)
    most = OLD_PATCH_BUCKETS[-1]
    with pytest.raises(ValueError, match=rf"would have 40000 patches, at most {most}"):
        processor.measure_image((800, 800))


def test_vlm2vec_makes_thin_images_square(old: Callable[[str], OldCase], tmp_path: Path) -> None:
    """Those with a side under 28 become 56 x 56, as its authors' code says it; byte for byte."""
    case, preset = old("qwen2"), PRESETS["vlm2vec-v2.0"]
    processor = E5V.load_processor(case.folder, preset=preset.name)
    limits = {"factor": 8, "min_pixels": preset.min_pixels, "max_pixels": preset.max_pixels}
    for size in [(27, 150), (150, 27), (4, 900), (27, 27), (28, 28), (28, 61)]:
        picture(*size).quantize(30).save(tmp_path / "a.png")  # a palette: filters differ
        image = Image.open(tmp_path / "a.png")
        if image.size[0] < 28 or image.size[1] < 28:
            image = image.resize((56, 56))
        image = image.convert("RGB")
        resized = smart_resize((image.height, image.width), **limits)
        (item,) = processor.measure([tmp_path / "a.png"], preset.choose())
        expected = cut_patches(image, resized, patch=4, merge=2, window=0)
        np.testing.assert_array_equal(processor.load(item).image.pixels, expected.pixels)
        assert item.length == len(expected.pixels) // 4 + len(item.ids) - 1
    assert (resized, len(expected.pixels)) == ((40, 88), 220)
