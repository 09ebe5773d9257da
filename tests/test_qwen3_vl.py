"""Qwen3-VL against PyTorch's on random models: whole and block by block."""

import dataclasses
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
from flax import nnx
from hf_models import difference, picture
from PIL import Image
from qwen_models import (
    QWEN3_RECIPES,
    QwenCase,
    QwenRecipe,
    assert_same_files,
    build_qwen3_vl,
    build_qwen_tokenizer,
    reference_resize,
)
from transformers.models.qwen3_vl.modeling_qwen3_vl import apply_rotary_pos_emb_vision
from transformers.vision_utils import (
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
)

from e5v_jax import E5V
from e5v_jax.checkpoints.from_hf import Args, convert
from e5v_jax.checkpoints.hf_source import open_source
from e5v_jax.checkpoints.loading import abstract_model
from e5v_jax.checkpoints.to_hf import Args as ExportArgs
from e5v_jax.checkpoints.to_hf import convert as export
from e5v_jax.dryrun.flops import traced_flops
from e5v_jax.encode.batching import plan_batches
from e5v_jax.families.base import BatchShape, Measured
from e5v_jax.families.qwen_vl import QWEN_VL
from e5v_jax.families.qwen_vl.positions import position_ids
from e5v_jax.families.qwen_vl.presets import ARCHITECTURES
from e5v_jax.families.qwen_vl.processor import PATCH_BUCKETS, QwenVLProcessor
from e5v_jax.families.qwen_vl.resize import smart_resize
from e5v_jax.families.qwen_vl.vision import interpolation
from e5v_jax.families.qwen_vl.vision_blocks import Seen
from e5v_jax.nn.layers import Build, Precision, l2_normalize
from e5v_jax.nn.rope import apply_rope
from e5v_jax.presets import PRESETS
from e5v_jax.runtime import Runtime
from e5v_jax.sharding import make_mesh

PRESET = PRESETS["qwen3-vl-embedding"]
TEXTS = ["A dog sits.", "Fußball 🎉!"]


def transparent(height: int, width: int) -> Image.Image:
    """An image that shows what is under it, more towards the right."""
    image = picture(height, width, 3)
    alpha = np.tile(np.linspace(0, 255, width).astype(np.uint8), (height, 1))
    image.putalpha(Image.fromarray(alpha))
    return image


IMAGES: list[Any] = [
    picture(70, 45),  # portrait
    picture(40, 56),
    picture(50, 50),
    picture(6, 200),  # thin, and less than the least
    picture(400, 2),  # 200 to 1
    picture(1, 1),
    picture(3, 100),
    picture(100, 90),  # larger than the cap of 50 tokens
    transparent(48, 64),
]
ITEMS = [TEXTS[0], *IMAGES, {"text": "at night", "image": picture(20, 90)}, TEXTS[1]]


def expected(case: QwenCase, items: list[Any]) -> np.ndarray:
    """The authors' way of calling: ``format_model_input``, the tokenizer's own last token."""
    head = "<|im_start|>system\nRepresent the user's input.<|im_end|>\n<|im_start|>user\n"
    tail = "<|im_end|>\n<|im_start|>assistant\n"
    vectors = []
    for item in items:
        item = (
            item if isinstance(item, dict) else {"text" if isinstance(item, str) else "image": item}
        )
        content = ("<image>" if "image" in item else "") + item.get("text", "")
        vectors.append(case.torch_vector(f"{head}{content}{tail}", item.get("image")))
    return np.stack(vectors)


def load(case: QwenCase, items: list[Any]) -> list[Any]:
    processor = case.e5v.processor
    return [processor.load(item) for item in processor.measure(items, PRESET.choose())]


def embed(case: QwenCase, batch: Any) -> np.ndarray:
    """fp32 [B, D], normalised, of the module alone."""
    return np.asarray(l2_normalize(jax.jit(case.module.encode)(batch)))


# --- whole models --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", QWEN3_RECIPES)
def test_embeddings_equal_torch(name: str, qwen: Callable[[str], QwenCase]) -> None:
    case = qwen(name)
    theirs = expected(case, ITEMS)
    assert (theirs @ theirs.T - np.eye(len(ITEMS))).max() < 0.999  # the items are told apart
    assert difference(case.e5v.encode(ITEMS), theirs) <= 1e-5


@pytest.mark.slow
def test_images_of_other_buckets(qwen: Callable[[str], QwenCase]) -> None:
    """Up to 600 tokens, of which the largest image would have 775; and its transparency dropped."""
    case = dataclasses.replace(qwen("tied"), max_tokens=600)
    items = [picture(200, 250), picture(104, 136)]
    model = case.load()
    assert difference(model.encode(items), expected(case, items)) <= 1e-5
    keys = {shape.shape_key for shape in model.statistics.compilations}
    assert keys == {1216, 2432} <= set(PATCH_BUCKETS)


def test_e5v_prompts_and_no_end_of_text(qwen: Callable[[str], QwenCase], tmp_path: Path) -> None:
    """An Instruct checkpoint with E5-V's recipe: its tokenizer appends nothing."""
    case = qwen("tied")
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).symlink_to(case.folder / file)
    build_qwen_tokenizer().save_pretrained(tmp_path)
    other = QwenCase(tmp_path, case.torch_model, max_tokens=40)
    items = [IMAGES[0], {"text": "at night", "image": IMAGES[2]}]
    assert difference(other.load().encode(items), other.torch_embed(items)) <= 1e-5


def test_bf16(qwen: Callable[[str], QwenCase]) -> None:
    """Against PyTorch in fp32: the error is our rounding alone."""
    case = qwen("tied")
    items = [IMAGES[0], IMAGES[3], ITEMS[-2]]
    cosine = (case.load("bfloat16").encode(items) * expected(case, items)).sum(axis=1)
    assert cosine.min() >= 0.999 and cosine.max() < 1 - 1e-6  # it did run in bf16


def test_vectors_do_not_depend_on_the_batch(qwen: Callable[[str], QwenCase]) -> None:
    """Nor on order, padding, or the bucket and length that an image is padded to."""
    model, items = qwen("tied").e5v, ITEMS[1:11]
    together = model.encode(items)
    assert difference(model.encode(items[::-1], batch_size=1)[::-1], together) <= 1e-6
    loaded = load(qwen("tied"), items[:2])
    rows, shape = [loaded[1], None, loaded[0]], BatchShape(3, 160, 240)
    found = embed(qwen("tied"), model.processor.stack(rows, shape))
    assert np.isfinite(found).all()  # where there is no key to see, too
    assert difference(found[[2, 0]], together[:2]) <= 1e-6


def test_positions_matter(qwen: Callable[[str], QwenCase]) -> None:
    """M-RoPE, learned positions and deepstack each move the vector of an image."""
    case = qwen("tied")
    batch = case.e5v.processor.stack(load(case, IMAGES[:1]), BatchShape(1, 128, 208))
    whole, patches = embed(case, batch), batch.patches
    turned = patches._replace(grid=patches.grid[:, ::-1])
    moved = patches._replace(place=np.where(patches.place > 0, 1, patches.place))
    for other in (
        batch._replace(positions=None),
        batch._replace(patches=turned),
        batch._replace(patches=moved),
    ):
        assert difference(embed(case, other), whole) > 1e-3
    training = np.asarray(l2_normalize(jax.jit(lambda b: case.module(b, remat="full"))(batch)))
    assert difference(training, whole) <= 1e-6


# --- blocks --------------------------------------------------------------------------------------


@torch.no_grad()
def test_blocks_equal_torch(qwen: Callable[[str], QwenCase]) -> None:
    """Embedding, positions, rope, a block, mergers: on two images of one batch, padded."""
    case = qwen("deep-3")
    module, visual = case.module.visual, case.torch_model.model.visual
    cfg = case.e5v.config.vision
    images = [picture(24, 96), picture(64, 32)]  # grids 6 x 24 and 16 x 8
    theirs = [case.torch_image(image) for image in images]
    patches = case.e5v.processor.stack(load(case, images), BatchShape(2, 128, 208)).patches
    place, grid = jnp.asarray(patches.place, jnp.int32), jnp.asarray(patches.grid)
    index, weight = interpolation(place, grid, cfg.position_side)
    x = module.embed(patches.pixels, place, grid)
    angles = module.angles(place)
    lengths = jnp.sum(place[..., 0] >= 0, axis=1)
    block = jax.tree.map(lambda stack: stack[1], module.blocks)
    deep_merger = jax.tree.map(lambda stack: stack[2], module.deepstack_merger_list)
    features, deep = jax.jit(module.__call__)(patches)
    for row, (pixels, thw) in enumerate(theirs):
        grid_thw, n = torch.tensor([thw]), len(pixels)
        assert (lengths[row], tuple(grid[row].tolist())) == (n, tuple(thw[1:]))
        taps, weights = get_vision_interpolation_indices_and_weights(
            grid_thw, cfg.position_side, align_corners=True, spatial_merge_size=2
        )
        # a tap of no weight may be another row of the table
        ours, dense = np.zeros((2, n, cfg.num_position_embeddings))
        np.add.at(ours, (np.arange(n)[:, None], index[row, :n]), np.asarray(weight[row, :n]))
        np.add.at(dense, (np.arange(n)[:, None], taps.numpy()), weights.numpy())
        np.testing.assert_allclose(ours, dense, atol=1e-6)
        places = get_vision_position_ids(grid_thw, 2)
        np.testing.assert_array_equal(place[row, :n], places)
        positions = (visual.pos_embed(taps) * weights[..., None]).sum(1)
        h = visual.patch_embed(pixels) + positions
        np.testing.assert_allclose(x[row, :n], h, atol=1e-5)
        cos, sin = visual.rotary_pos_emb(h, places)
        q = torch.randn(n, cfg.num_heads, cfg.hidden_size // cfg.num_heads)
        turned, _ = apply_rotary_pos_emb_vision(q, q, cos, sin)
        found = apply_rope(jnp.asarray(q)[None], angles[row : row + 1, :n])[0]
        np.testing.assert_allclose(found, turned, atol=1e-5)
        bounds = torch.tensor([0, n], dtype=torch.int32)
        out = visual.blocks[1](h, cu_seqlens=bounds, position_embeddings=(cos, sin))
        seen = Seen(lengths[row : row + 1], None)
        found = block(x[row : row + 1], angles[row : row + 1], seen)[0, :n]
        np.testing.assert_allclose(found, out, atol=2e-5)
        merged = deep_merger(jnp.asarray(h)[None])[0]
        np.testing.assert_allclose(merged, visual.deepstack_merger_list[2](h), atol=2e-5)
        np.testing.assert_allclose(
            module.merger(jnp.asarray(h)[None])[0], visual.merger(h), atol=2e-5
        )
        whole = visual(pixels, grid_thw=grid_thw)
        scale = float(whole.pooler_output.abs().max())
        np.testing.assert_allclose(features[row, : n // 4], whole.pooler_output, atol=1e-5 * scale)
        for j, expected_deep in enumerate(whole.deepstack_features):
            np.testing.assert_allclose(deep[row, j, : n // 4], expected_deep, atol=1e-5 * scale)


def test_patches_are_transformers_own(qwen: Callable[[str], QwenCase]) -> None:
    case = qwen("odd")
    for image in (picture(37, 90), transparent(30, 50)):
        theirs, (_, rows, columns) = case.torch_image(image)
        ours = load(case, [image])[0].image
        assert ours.grid == (rows, columns)
        pixels = (ours.pixels.astype(np.float32) / 255 - 0.5) / 0.5  # [P, 3*p*p]
        frames = theirs.numpy().reshape(len(theirs), 3, 2, -1)
        for frame in (0, 1):
            both = frames[:, :, frame].reshape(len(theirs), -1)
            np.testing.assert_allclose(pixels, both, atol=1e-6)


def test_position_ids_are_get_rope_index(qwen: Callable[[str], QwenCase]) -> None:
    rng = np.random.default_rng(0)
    model = qwen("tied").torch_model.model
    for _ in range(40):
        before, after, rows, columns = (int(n) for n in rng.integers(1, 12, 4))
        length = before + rows * columns + after
        kinds = torch.zeros(1, length, dtype=torch.int)
        kinds[0, before : before + rows * columns] = 1
        expected_ids, _ = model.get_rope_index(
            kinds.long(), kinds, image_grid_thw=torch.tensor([[1, 2 * rows, 2 * columns]])
        )
        found = position_ids(length, before, (rows, columns))
        np.testing.assert_array_equal(found, expected_ids[:, 0].T)


@pytest.mark.parametrize(
    ("size", "default", "hf_cap"),
    [
        ((375, 500), (384, 512), 192),
        ((480, 640), (480, 640), 300),
        ((768, 1024), (768, 1024), 768),
        ((336, 336), (320, 320), 100),  # Python rounds half to even
        ((1080, 1920), (992, 1792), 1222),
        ((3024, 4032), (1152, 1536), 1230),
        ((20, 20), (64, 64), 4),
    ],
)
def test_smart_resize(size: tuple[int, int], default: tuple[int, int], hf_cap: int) -> None:
    for most in (1800, 1280):
        limits = {"factor": 32, "min_pixels": 4 * 32**2, "max_pixels": most * 32**2}
        height, width = smart_resize(size, **limits)
        if most == 1800:
            assert (height, width) == default
        else:
            assert height * width // 32**2 == hf_cap


def test_smart_resize_is_the_references() -> None:
    rng = np.random.default_rng(1)
    for size in np.exp(rng.uniform(0, 8.5, (500, 2))).astype(int).tolist():
        limits = {"factor": 32, "min_pixels": 4096, "max_pixels": 1800 * 32**2}
        if max(size) / min(size) > 200:
            with pytest.raises(ValueError, match=r"more than 200 times the other"):
                smart_resize(tuple(size), **limits)
        else:
            assert smart_resize(tuple(size), **limits) == reference_resize(*size, **limits)


# --- sizes, programs, checkpoints ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "total", "tower"),
    [
        ("qwen3-vl-2b", 2_127_532_032, 406_957_056),
        ("qwen3-vl-4b", 4_437_815_808, 415_347_712),
        ("qwen3-vl-8b", 8_144_793_840, 576_388_336),
    ],
)
def test_parameter_counts(name: str, total: int, tower: int) -> None:
    """Of the published checkpoints, without the head."""
    rows = QWEN_VL.parameters(ARCHITECTURES[name]).rows
    sizes = {row.name: math.prod(row.shape) * (row.layers or 1) for row in rows if row.name}
    assert sum(sizes.values()) == total
    assert sum(size for path, size in sizes.items() if path.startswith("visual.")) == tower


def test_flops_of_an_image_are_the_traced_ones() -> None:
    config = ARCHITECTURES["qwen3-vl-2b"]
    assert QWEN_VL.image_cost(config, 1, 768, 2).flops / 1e12 == pytest.approx(0.56, rel=0.01)
    runtime = Runtime.on(make_mesh(1, 1, 1, devices=jax.devices()[:1]))
    build = Build(Precision(jnp.bfloat16, jnp.bfloat16), runtime)
    graphdef, state = nnx.split(abstract_model(QWEN_VL, config, build).visual)
    for patches in (768, 7200):
        batch = jax.eval_shape(
            lambda p=patches: QWEN_VL.example_batch(config, BatchShape(2, 128, p)).patches
        )
        jaxpr = jax.make_jaxpr(lambda s, b: nnx.merge(graphdef, s)(b))(state, batch)
        by_hand = QWEN_VL.image_cost(config, 2, patches, 2).flops
        assert traced_flops(jaxpr) == pytest.approx(by_hand, rel=0.01)


def test_programs_and_padding_of_photographs(qwen: Callable[[str], QwenCase], shared: Path) -> None:
    """500 photographs, as they are and made other sizes, and their captions: planned only."""
    case = qwen("tied")
    vision = ARCHITECTURES["qwen3-vl-2b"].vision
    config = dataclasses.replace(
        case.e5v.config, vision=dataclasses.replace(vision, out_hidden_size=64)
    )
    processor = QwenVLProcessor(config, case.tokenizer, None, PRESET)
    rng = np.random.default_rng(0)
    sizes = []
    for file in sorted((shared / "data/flickr8k/images").iterdir()):
        width, height = Image.open(file).size
        sizes.append((height, width))
    sizes += [(224, 224)] * 100
    for side in np.exp(rng.uniform(np.log(200), np.log(2400), 200)):
        height, width = sizes[rng.integers(200)]
        scale = side / max(height, width)
        sizes.append((round(height * scale), round(width * scale)))
    prompt = 22  # tokens of the template
    items, patches = [], 0
    for i, size in enumerate(sizes):
        tokens, key = processor.measure_image(size)
        patches += 4 * tokens
        items.append(Measured(i, [1], tokens + prompt, key))
    items += [Measured(i, [1], 20 + n, 0) for i, n in enumerate(rng.integers(6, 30, 500))]
    for max_tokens in (1024, 16384):
        batches = list(
            plan_batches(
                items,
                padded_length=processor.padded_length,
                max_rows=None,
                max_tokens=max_tokens,
                multiple=1,
            )
        )
        padded = sum(b.shape.rows * b.shape.shape_key for b in batches)
        shapes = {b.shape for b in batches}
        assert 1 - patches / padded < 0.15
        assert len(shapes) <= 14


def test_there_and_back_again(qwen: Callable[[str], QwenCase], tmp_path: Path) -> None:
    """Converted, embedded with, and exported to the same bits, both frames of the kernel too."""
    case = qwen("tied")
    convert(Args(str(case.folder), tmp_path / "ours", preset=PRESET.name))
    limits = {"min_pixels": 4 * 64, "max_pixels": case.max_tokens * 64}
    model = E5V.from_pretrained(tmp_path / "ours", dtype="float32", **limits)
    assert (model.preset.name, model.config) == (PRESET.name, case.e5v.config)
    assert difference(model.encode(ITEMS[:4]), case.e5v.encode(ITEMS[:4])) <= 1e-6
    export(ExportArgs(tmp_path / "ours", tmp_path / "theirs"))
    tensors = assert_same_files(case.folder, tmp_path / "theirs")
    frames = tensors["model.visual.patch_embed.proj.weight"]
    assert np.abs(frames[:, :, 0] - frames[:, :, 1]).max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize(("quantize", "least"), [("int8", 0.999), ("nf4", 0.8)])
def test_quantised_decoders(quantize: str, least: float, tmp_path: Path) -> None:
    recipe = QwenRecipe(text={"hidden_size": 64, "intermediate_size": 128}, seed=34)
    case = build_qwen3_vl(recipe, tmp_path)
    cosine = (case.load(quantize=quantize).encode(IMAGES[:2]) * case.e5v.encode(IMAGES[:2])).sum(1)
    assert least <= cosine.min() and cosine.max() < 1 - 1e-7


@pytest.mark.parametrize("layout", ["old", "base", "head"])
def test_other_names(layout: str, qwen: Callable[[str], QwenCase], tmp_path: Path) -> None:
    """Of before transformers 4.52, of the model without its head, and with a head of its own."""
    case = qwen("tied")
    tensors = safetensors.numpy.load_file(case.folder / "model.safetensors")
    if layout == "head":
        tensors["lm_head.weight"] = tensors["model.language_model.embed_tokens.weight"]
    else:
        text = "model." if layout == "old" else "language_model."
        for key in list(tensors):
            name = key.removeprefix("model.").replace("language_model.", text)
            tensors[name] = tensors.pop(key)
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    shutil.copy(case.folder / "config.json", tmp_path)
    source, expected_source = open_source(tmp_path), open_source(case.folder)
    names = list(expected_source.shapes())
    for name, ours, theirs in zip(
        names, source.read(names), expected_source.read(names), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs, err_msg=name)
