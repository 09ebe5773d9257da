"""LLaVA-OneVision against transformers': feature maps made smaller, and all that LLaVA-NeXT has."""

import json
import math
from collections.abc import Callable
from functools import cache, cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from hf_models import Case, Recipe, build_tokenizer, picture, prompt_of, randomise
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionProcessor,
    Qwen2Config,
    SiglipVisionConfig,
)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

from e5v_jax.checkpoints import from_hf, to_hf
from e5v_jax.checkpoints.converted import ConvertedFolder
from e5v_jax.checkpoints.hf_source import open_source
from e5v_jax.data.images import ImageError
from e5v_jax.families.base import BatchShape
from e5v_jax.families.llava_next import LLAVA_NEXT
from e5v_jax.families.llava_next.preprocessor import check_preprocessor, hf_processor
from e5v_jax.families.llava_next.processor import TILE_BUCKETS, measure_image
from e5v_jax.families.llava_next.shrinking import shrink, shrunk_size
from e5v_jax.families.llava_next.tiling import (
    NEWLINE,
    feature_map_size,
    image_token_index,
    num_image_tokens,
    select_best_resolution,
)
from e5v_jax.nn.layers import Build, Precision
from e5v_jax.prompts import choose_prompt
from e5v_jax.runtime import Runtime
from e5v_jax.sharding import make_mesh

GRID = ((1, 1), (1, 2), (2, 1), (3, 1), (1, 4), (2, 2), (3, 3))  # few numbers of tiles to compile
RECIPES = {
    "siglip-max-3": (
        3,
        Recipe(
            Qwen2Config,
            "chatml",
            tower=SiglipVisionConfig,
            vision={"image_size": 30, "vision_use_head": False},
            feature_layer=-1,
            pinpoints=GRID,
            image_mean=(0.5, 0.5, 0.5),
            seed=30,
        ),
    ),
    "clip-max-2": (
        2,
        Recipe(
            Qwen2Config,
            "chatml",
            tower=CLIPVisionConfig,
            feature_layer=[-2, 1],
            pinpoints=GRID,
            text={"num_hidden_layers": 2},
            tied=True,
            seed=31,
        ),
    ),
}
"""The number of "anyres_max_N", and the rest."""


class OneVisionCase(Case):
    """The parts of transformers' processor, which as a whole asks for torchvision's videos."""

    @cached_property
    def image_processor(self) -> LlavaOnevisionImageProcessorPil:
        config = self.torch_model.config
        side = config.vision_config.image_size
        return LlavaOnevisionImageProcessorPil(
            size={"height": side, "width": side},
            image_grid_pinpoints=config.image_grid_pinpoints,
            **self.image_options,
        )

    def count(self, size: tuple[int, int]) -> int:
        """The tokens of an image of (height, width) pixels."""
        return reference_count(self.torch_model.config, size)

    def torch_inputs(self, items: list[Any]) -> dict[str, torch.Tensor]:
        prompts, images = zip(*(prompt_of(item, self.template) for item in items), strict=True)
        if images[0] is None:
            return super().torch_inputs(items)
        pixels = self.image_processor(list(images), return_tensors="pt")
        strings = [
            prompt.replace("<image>", "<image>" * self.count((image.height, image.width)))
            for prompt, image in zip(prompts, images, strict=True)
        ]
        text = self.tokenizer(strings, return_tensors="pt", padding=True)
        return {**text, **{key: pixels[key] for key in ("pixel_values", "image_sizes")}}


def reference_count(config: Any, size: tuple[int, int]) -> int:
    """As transformers' processor has it."""
    vision, side = config.vision_config, config.vision_config.image_size
    is_clip = config.vision_feature_select_strategy == "default"
    reference: Any = LlavaOnevisionProcessor
    self = SimpleNamespace(
        image_processor=SimpleNamespace(image_grid_pinpoints=config.image_grid_pinpoints),
        num_image_tokens=(vision.image_size // vision.patch_size) ** 2 + is_clip,
        vision_aspect_ratio=config.vision_aspect_ratio,
    )
    self._get_unpadded_features = lambda *args: reference._get_unpadded_features(self, *args)
    return int(reference._get_number_of_features(self, *size, side, side)) - is_clip


@pytest.fixture(scope="session")
def onevision(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], OneVisionCase]:
    """Random tiny models by their name in RECIPES, each built once."""

    @cache
    def build(name: str) -> OneVisionCase:
        (most, recipe), folder = RECIPES[name], tmp_path_factory.mktemp(name)
        next_config = recipe.llava_config().to_dict()
        kept = ("image_token_index", "image_grid_pinpoints", "tie_word_embeddings")
        layers = ("vision_feature_layer", "vision_feature_select_strategy")
        config = LlavaOnevisionConfig(
            **{key: next_config[key] for key in (*kept, *layers, "text_config", "vision_config")},
            vision_aspect_ratio=f"anyres_max_{most}",
            attn_implementation="eager",
        )
        model = LlavaOnevisionForConditionalGeneration(config).eval()
        randomise(model, recipe.seed)
        model.tie_weights()
        model.save_pretrained(folder)
        tokenizer = build_tokenizer(recipe.template)
        tokenizer.add_special_tokens({"additional_special_tokens": ["<video>"]})
        tokenizer.save_pretrained(folder)
        case = OneVisionCase(folder, recipe.template, model)
        if recipe.image_mean is not None:
            case.image_options = {"image_mean": recipe.image_mean, "image_std": [0.5, 0.3, 0.7]}
        case.image_processor.save_pretrained(folder)
        return case

    return build


@pytest.fixture(scope="module", params=RECIPES)
def case(request: pytest.FixtureRequest, onevision: Callable[[str], OneVisionCase]) -> Case:
    return onevision(request.param)


SIZES = [(30, 30), (58, 58), (8, 200), (200, 8), (3, 300), (100, 100), (76, 90), (88, 30)]


def scene(i: int) -> Image.Image:
    """An image of the size of that number, in colours of its own: long means even out the rest."""
    height, width = SIZES[i]
    pixels = np.roll(np.asarray(picture(height, width, seed=i)), i, axis=-1)
    return Image.fromarray(pixels // 2 ** (i % 4))


BOTH = {"text": "make it blue", "image": picture(115, 88)}
ITEMS: list[Any] = ["A dog sits on Müller's sofa 🎉", *map(scene, range(len(SIZES))), BOTH]


def shrinks(config: Any, size: tuple[int, int]) -> bool:
    """Whether the feature map of an image of this size is made smaller."""
    vision = config.vision
    geometry: dict[str, Any] = {
        "grid_pinpoints": config.image_grid_pinpoints,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
    }
    map_size = feature_map_size(size, **geometry)
    return shrunk_size(map_size, vision.patches_per_side, config.max_tiles) != map_size


def test_embeddings_equal_torch(case: OneVisionCase) -> None:
    """In fp32 to 1e-5, whatever is in the batch: half of the images are made smaller, half not."""
    expected = np.concatenate([case.torch_embed([item]) for item in ITEMS])
    cosine = expected @ expected.T - np.eye(len(ITEMS))
    assert cosine.max() < 0.999  # the items are told apart
    shrunk = [shrinks(case.e5v.config, size) for size in SIZES]
    assert 3 <= sum(shrunk) <= len(SIZES) - 3
    found = case.e5v.encode(ITEMS, batch_size=8)
    assert np.abs(found - expected).max() <= 1e-5


def test_batch_mates_padding_and_order(onevision: Callable[[str], OneVisionCase]) -> None:
    """Two sizes in a batch, more tiles than an image has, another place in it: the same vector."""
    name = "siglip-max-3"
    model = onevision(name).e5v
    items = [ITEMS[1], ITEMS[2], ITEMS[6], BOTH]
    alone = np.concatenate([model.encode([item], batch_size=1) for item in items])
    found = model.encode([*items[::-1], *items], batch_size=8)
    for again in (found[:4][::-1], found[4:]):
        assert np.abs(again - alone).max() <= 1e-6
    processor = model.processor  # and as training pads them, all in one batch
    measured = processor.measure(items, choose_prompt(None, None))
    prepared = [processor.load(item) for item in measured]
    shape = BatchShape(5, 512, 13)
    batch = jax.tree.map(np.asarray, processor.stack([*prepared, None], shape))
    together = np.asarray(jax.jit(lambda m, b: m.encode(b))(onevision(name).module, batch))[:4]
    together = together / np.linalg.norm(together, axis=1, keepdims=True)
    assert np.abs(together - alone).max() <= 1e-6
    example = jax.eval_shape(lambda: LLAVA_NEXT.example_batch(model.config, shape))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), example) == jax.tree.map(
        lambda x: (x.shape, x.dtype), batch
    )


def test_bf16(onevision: Callable[[str], OneVisionCase]) -> None:
    """Against PyTorch in fp32, an image that is made smaller: the error is our rounding alone."""
    case = onevision("siglip-max-3")
    cosine = (case.load("bfloat16").encode(ITEMS[6]) * case.torch_embed([ITEMS[6]])[0]).sum()
    assert 0.999 <= cosine < 1 - 1e-6


def test_conversion_and_round_trip(case: OneVisionCase, tmp_path: Path) -> None:
    """There and back to the same bits and files; the folder says what the checkpoint does."""
    from_hf.convert(from_hf.Args(str(case.folder), tmp_path / "ours"))
    ours, source = ConvertedFolder(tmp_path / "ours"), open_source(case.folder)
    assert ours.config == case.e5v.config == source.config
    to_hf.convert(to_hf.Args(tmp_path / "ours", tmp_path / "back"))
    back = LlavaOnevisionForConditionalGeneration.from_pretrained(tmp_path / "back").state_dict()
    theirs = case.torch_model.state_dict()
    assert back.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(back[name], tensor), name
    for file in case.folder.glob("*.json"):
        assert json.loads((tmp_path / "back" / file.name).read_text()) == json.loads(
            file.read_text()
        )


P, C = "preprocessor_config.json", "config.json"
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (C, {"vision_aspect_ratio": "anyres"}, "vision_aspect_ratio is 'anyres': only 'anyres_max_'"),
    (C, {"vision_aspect_ratio": "anyres_max_0"}, "vision_aspect_ratio is 'anyres_max_0'"),
    (C, {"vision_aspect_ratio": "pad"}, "vision_aspect_ratio is 'pad'"),
    (C, {"vision_feature_select_strategy": "default"}, "only 'full' fits a tower"),
    (C, {"projector_hidden_act": "relu"}, "projector_hidden_act is 'relu'"),
    (C, {"image_grid_pinpoints": [[30, 40]]}, "image_grid_pinpoints is [[30, 40]]"),
    (P, {"image_processor_type": "LlavaNextImageProcessor"}, "image_processor_type is 'LlavaNext"),
    (P, {"image_grid_pinpoints": None}, "image_grid_pinpoints is None"),
    (P, {"size": {"height": 28, "width": 28}}, "size is {'height': 28"),
    (P, {"resample": 2}, "resample is 2: only 3 is supported"),
    (P, {"vision_aspect_ratio": "anyres_max_4"}, "is 'anyres_max_4': only 'anyres_max_3' is"),
    (P, {"num_image_tokens": 729}, "num_image_tokens is 729: only 16 is supported"),
]


@pytest.mark.parametrize(("file", "change", "message"), REFUSED, ids=lambda x: str(x)[:40])
def test_refused_by_name(
    file: str,
    change: dict[str, Any],
    message: str,
    onevision: Callable[[str], OneVisionCase],
    tmp_path: Path,
) -> None:
    folder = onevision("siglip-max-3").folder
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    settings = {**json.loads((folder / file).read_text()), **change}
    (tmp_path / file).unlink()
    (tmp_path / file).write_text(json.dumps(settings))
    with pytest.raises(ValueError) as caught:
        open_source(tmp_path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_videos_are_refused(onevision: Callable[[str], OneVisionCase]) -> None:
    model = onevision("siglip-max-3").e5v
    with pytest.raises(ValueError, match="unknown key 'video'"):
        model.encode([{"video": "a.mp4"}])
    with pytest.raises(ValueError, match="<video>"):
        model.encode(["what <video> shows"], special_tokens="refuse")
    assert np.isfinite(model.encode(["what <video> shows"])).all()  # its characters, no video


# --- the geometry of the published models --------------------------------------------------------

SIDE = 27  # patches of a tile
PINPOINTS = tuple((384 * h, 384 * w) for h in range(1, 7) for w in range(1, 7))
GEOMETRY: dict[str, Any] = {"grid_pinpoints": PINPOINTS, "image_size": 384, "patch_size": 14}
PHOTOS = [
    (375, 500),
    (480, 640),
    (768, 1024),
    (1080, 1920),
    (3024, 4032),
    (4000, 700),
    (2304, 2304),
]


def published(most: int) -> Any:
    """All that transformers' model and processor need of a configuration."""
    return SimpleNamespace(
        vision_config=SimpleNamespace(image_size=384, patch_size=14),
        image_grid_pinpoints=[list(pair) for pair in PINPOINTS],
        vision_feature_select_strategy="full",
        vision_aspect_ratio=f"anyres_max_{most}",
    )


def test_packing_equals_torch() -> None:
    """The same features in, the same sequence out; what is not summed to the last bit."""
    generator = torch.Generator().manual_seed(0)
    for most, size in [*((9, size) for size in PHOTOS), (1, (480, 640)), (4, (900, 2000))]:
        height, width = select_best_resolution(size, PINPOINTS)
        tiles = 1 + height * width // 384**2
        features = torch.randn(tiles, SIDE**2, 3, generator=generator)
        newline = torch.randn(3, generator=generator)
        model: Any = SimpleNamespace(config=published(most))
        pack: Any = LlavaOnevisionModel.pack_image_features
        (expected,), _ = pack(model, [features], [size], newline, f"anyres_max_{most}")
        tokens = image_token_index(size, **GEOMETRY)
        before = feature_map_size(size, **GEOMETRY)
        after = shrunk_size(before, SIDE, most)
        rows = np.concatenate([features.flatten(0, 1).numpy(), newline[None].numpy()])
        if after == before:
            np.testing.assert_array_equal(rows[tokens], expected.numpy(), strict=True)
            continue
        index, weights = shrink(tokens, before, after)
        assert weights.dtype == np.float32 and index.dtype == np.int32
        assert weights.min() >= 0 and np.abs(weights.sum(axis=1) - 1).max() < 1e-6
        found = np.einsum("nt,ntd->nd", weights, rows[index])
        assert found.shape == expected.shape
        assert np.abs(found - expected.numpy()).max() <= 1e-5
        np.testing.assert_array_equal(found[: SIDE**2], expected[: SIDE**2].numpy())
        is_newline = index[:, 0] == NEWLINE
        assert is_newline.sum() == after[0]
        np.testing.assert_array_equal(found[is_newline], np.tile(newline.numpy(), (after[0], 1)))


def test_token_counts_equal_transformers() -> None:
    rng = np.random.default_rng(0)
    sizes = [
        *PHOTOS,
        (1, 1),
        (1, 3000),
        (3000, 1),
        *np.exp(rng.uniform(2, 9, (800, 2))).astype(int),
    ]
    for most in (1, 4, 9, 36):
        config = published(most)
        for height, width in sizes:
            size = int(height), int(width)
            found = num_image_tokens(size, **GEOMETRY, max_tiles=most)
            assert found == reference_count(config, size), size


def test_where_nothing_is_left() -> None:
    """PyTorch makes no empty map, and transformers fails; here the image is refused."""
    with pytest.raises(ImageError, match="of 20x1 patches, which this model makes 17x0"):
        shrunk_size((1, 20), 4, 1)
    with pytest.raises(RuntimeError, match="greater than 0"):
        torch.nn.functional.interpolate(torch.ones(1, 1, 1, 20), [0, 17], mode="bilinear")


def test_few_programs() -> None:
    """Of any image, and their padding: of tiles, which are cheap, and of positions."""
    config = LLAVA_NEXT.architectures["llava-onevision-qwen2-7b"]
    rng = np.random.default_rng(0)
    heights = rng.integers(200, 3000, 500)
    ratios = rng.choice([3 / 4, 4 / 3, 2 / 3, 3 / 2, 9 / 16, 16 / 9, 1], 500)
    shapes, positions, padded = set(), 0, 0
    for height, ratio in zip(heights, ratios, strict=True):
        size = int(height), round(height * ratio)
        shape = LLAVA_NEXT.image_shape(config, size, 20)
        shapes.add(shape)
        positions += measure_image(config, size)[0] + 20
        padded += shape[0]
    assert len(shapes) <= 24
    assert padded <= 1.08 * positions
    assert {tiles for _, tiles in shapes} <= set(TILE_BUCKETS)


def test_parameter_count_of_the_published_model() -> None:
    """Of the architecture that has a name, and as transformers has it, without the head."""
    config = LLAVA_NEXT.architectures["llava-onevision-qwen2-7b"]
    precision = Precision(param=np.float32, compute=np.float32)
    build = Build(precision, Runtime.on(make_mesh(data=-1, fsdp=1)))
    module = jax.eval_shape(lambda: LLAVA_NEXT.build(config, build, rngs=nnx.Rngs(0)))
    found = sum(math.prod(x.shape) for x in jax.tree.leaves(nnx.state(module)))
    hf = LlavaOnevisionConfig(
        vision_config={
            "model_type": "siglip_vision_model",
            **{"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 26},
            **{"num_attention_heads": 16, "image_size": 384, "patch_size": 14},
            "vision_use_head": False,
        },
        text_config={
            "model_type": "qwen2",
            **{"vocab_size": 152128, "hidden_size": 3584, "intermediate_size": 18944},
            **{"num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4},
            "rope_theta": 1e6,
        },
    )
    read = LLAVA_NEXT.match_preprocessor(
        LLAVA_NEXT.read_config(hf.to_dict()), {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    )
    assert read == config
    with torch.device("meta"):
        theirs = LlavaOnevisionModel(hf).state_dict()
    unused = sum(x.numel() for key, x in theirs.items() if "post_layernorm" in key)
    assert found == sum(x.numel() for x in theirs.values()) - unused
    assert found == 7_485_578_528


def test_the_processor_for_transformers(case: OneVisionCase) -> None:
    """What an export says of its images is what transformers would do, and what is followed."""
    config = case.e5v.config
    settings = hf_processor(config, case.e5v.preset)
    reader: Any = LlavaOnevisionImageProcessorPil(**settings["image_processor"])
    size, expected = SIZES[4], case.image_processor
    pixels = [one(picture(*size), return_tensors="np") for one in (reader, expected)]
    np.testing.assert_array_equal(*(one["pixel_values"] for one in pixels))
    check_preprocessor(config, settings["image_processor"])
    around = {key: value for key, value in settings.items() if "_processor" not in key}
    check_preprocessor(config, around)
