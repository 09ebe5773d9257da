"""E5V.encode against PyTorch's LLaVA-NeXT on whole random models; each config field and each
part of the computation has to matter.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from hf_models import (
    RECIPES,
    TEXT_RECIPES,
    Case,
    Recipe,
    build_llava,
    build_text,
    build_tokenizer,
    difference,
    picture,
)
from transformers import MistralConfig

import e5v_jax.encode.e5v
from e5v_jax import E5V
from e5v_jax.checkpoints.converted import ConvertedFolder
from e5v_jax.checkpoints.from_hf import Args, convert
from e5v_jax.checkpoints.hf_source import HfSource
from e5v_jax.families.llava_next import model as llava_next
from e5v_jax.families.llava_next import processor, tiling
from e5v_jax.families.llava_next.config import LlavaNextConfig
from e5v_jax.nn import decoder, layers, rope, vision_tower
from e5v_jax.nn.attention import attention
from e5v_jax.nn.rope import RopeScaling
from e5v_jax.nn.text_config import TextConfig
from e5v_jax.nn.vision_config import VisionConfig
from e5v_jax.nn.vision_tower import normalise

TEXTS = [
    "A dog sits.",
    "Zwei Männer spielen Fußball 🎉 im Regen, and a third one, in a red jacket, watches them.",
]
IMAGES: list[Any] = [
    picture(70, 45),  # portrait
    picture(40, 56),  # landscape
    picture(50, 50),
    picture(8, 200),
    picture(300, 5),
    picture(1, 1),
]
BOTH: list[Any] = [
    {"text": "make it blue", "image": picture(61, 33)},
    {"text": "at night", "image": picture(20, 90)},
]
ITEMS = [TEXTS[0], *IMAGES[:3], BOTH[0], TEXTS[1], *IMAGES[3:], BOTH[1]]


def one_by_one(case: Case, items: list[Any]) -> np.ndarray:
    return np.concatenate([case.torch_embed([item]) for item in items])


# --- whole models --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_embeddings_equal_torch(name: str, llava: Callable[[str], Case]) -> None:
    case = llava(name)
    expected = one_by_one(case, ITEMS)
    cosine = expected @ expected.T - np.eye(len(ITEMS))
    assert cosine.max() < 0.99  # the items are told apart
    assert difference(case.e5v.encode(ITEMS, batch_size=8), expected) <= 1e-5


@pytest.mark.parametrize("items", [TEXTS, IMAGES + BOTH], ids=["text", "image"])
def test_equals_a_left_padded_batch(items: list[Any], llava: Callable[[str], Case]) -> None:
    """The authors pad on the left and read [:, -1]."""
    case = llava("llama-gqa")
    found = case.e5v.encode(items, batch_size=8)  # the shapes of the test above: no new compiling
    assert difference(found, case.torch_embed(items)) <= 1e-5


@pytest.mark.parametrize("name", TEXT_RECIPES)
def test_text_models_equal_torch(name: str, tmp_path: Path) -> None:
    case = build_text(TEXT_RECIPES[name], tmp_path)
    assert difference(case.e5v.encode(TEXTS, batch_size=2), case.torch_embed(TEXTS)) <= 1e-5


def test_texts_longer_than_the_window_are_refused(tmp_path: Path) -> None:
    """Up to its length the window changes nothing, as test_decoder.py shows."""
    recipe = Recipe(MistralConfig, "mistral", text={"sliding_window": 128})
    model = build_text(recipe, tmp_path).e5v
    long = (
        r"^input 0: 1\d\d tokens, the model takes at most 128 \(its sliding_window\): shorten the"
    )
    with pytest.raises(ValueError, match=long):
        model.encode(["word " * 20])


@pytest.mark.parametrize("name", ["llama-gqa", "mistral"])
def test_bf16(name: str, llava: Callable[[str], Case]) -> None:
    """Against PyTorch in fp32: the error is our rounding alone."""
    case = llava(name)
    items = [TEXTS[1], IMAGES[0], BOTH[1]]
    found = case.load("bfloat16").encode(items, batch_size=2)
    cosine = (found * one_by_one(case, items)).sum(axis=1)
    assert cosine.min() >= 0.999
    assert cosine.max() < 1 - 1e-6  # it did run in bf16


def test_full_size_image(tmp_path: Path) -> None:
    """Tiles of 336 pixels: 2340 tokens, positions far from zero."""
    recipe = Recipe(
        text={"num_hidden_layers": 2, "max_position_embeddings": 4096},
        vision={"num_hidden_layers": 2, "image_size": 336, "patch_size": 14},
        seed=9,
    )
    case = build_llava(recipe, tmp_path)
    item = picture(480, 640)
    image_tokens = (case.torch_inputs([item])["input_ids"] == case.e5v.config.image_token_id).sum()
    assert image_tokens == 2340
    assert difference(case.e5v.encode([item], batch_size=1), case.torch_embed([item])) <= 1e-5


def test_converted_folder_holds_the_same_model(
    llava: Callable[[str], Case], tmp_path: Path
) -> None:
    case = llava("llama-tied")
    convert(Args(str(case.folder), tmp_path / "converted"))
    source = ConvertedFolder(tmp_path / "converted")
    assert source.config == case.e5v.config
    names = list(source.shapes())
    from_hf = e5v_jax.encode.e5v.open_source(case.folder)
    assert set(names) == set(from_hf.shapes())
    for name, ours, theirs in zip(names, source.read(names), from_hf.read(names), strict=True):
        np.testing.assert_array_equal(ours, theirs, err_msg=name, strict=True)


@pytest.mark.parametrize("known", [True, False], ids=["known", "unknown to the tokenizer"])
def test_image_token_outside_the_table(
    known: bool, llava: Callable[[str], Case], tmp_path: Path
) -> None:
    """Some checkpoints have no row for `<image>`, the original LLaVA's not even the token."""
    case = llava("llama-gqa")
    raw = json.loads((case.folder / "config.json").read_text())
    rows = raw["image_token_index"]
    raw["text_config"]["vocab_size"] = rows
    (tmp_path / "config.json").write_text(json.dumps(raw))
    tensors = safetensors.numpy.load_file(case.folder / "model.safetensors")
    for key in tensors:
        if key.endswith(("embed_tokens.weight", "lm_head.weight")):
            tensors[key] = tensors[key][:rows]
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    build_tokenizer("llama3", with_image=known).save_pretrained(tmp_path)
    found = E5V.from_pretrained(tmp_path, dtype="float32").encode(BOTH, batch_size=2)
    assert difference(found, one_by_one(case, BOTH)) <= 1e-5


# --- planted bugs --------------------------------------------------------------------------------

Plant = Callable[[pytest.MonkeyPatch], None]


def _interleaved_rope(x: jax.Array, angles: jax.Array, _: float) -> jax.Array:
    cos, sin = jnp.cos(angles)[None, :, None], jnp.sin(angles)[None, :, None]
    first, second = x[..., ::2], x[..., 1::2]
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.stack(rotated, axis=-1).reshape(x.shape)


def _without_newlines(*args: Any, **kwargs: Any) -> np.ndarray:
    index = tiling.image_token_index(*args, **kwargs)
    return index[index != tiling.NEWLINE]


def _swapped_tiles(*args: Any, **kwargs: Any) -> tiling.TiledImage:
    tiled = tiling.tile_image(*args, **kwargs)
    return dataclasses.replace(tiled, tiles=tiled.tiles[[0, 2, 1, *range(3, len(tiled.tiles))]])


def _swapped_channels(*args: Any, **kwargs: Any) -> tiling.TiledImage:
    tiled = tiling.tile_image(*args, **kwargs)
    return dataclasses.replace(tiled, tiles=tiled.tiles[..., ::-1])


def _transposed_tiles(*args: Any, **kwargs: Any) -> tiling.TiledImage:
    tiled = tiling.tile_image(*args, **kwargs)
    return dataclasses.replace(tiled, tiles=tiled.tiles.transpose(0, 2, 1, 3))


def _size_as_width_height(*args: Any, **kwargs: Any) -> np.ndarray:
    return tiling.image_token_index(args[0][::-1], *args[1:], **kwargs)


def _tiled_kv_heads(q: jax.Array, k: jax.Array, v: jax.Array, **kwargs: Any) -> jax.Array:
    groups = (1, 1, q.shape[2] // k.shape[2], 1)  # heads 0 1 0 1 instead of 0 0 1 1
    return attention(q, jnp.tile(k, groups), jnp.tile(v, groups), **kwargs)


def _no_mask(*args: Any, is_causal: bool, **kwargs: Any) -> jax.Array:
    return attention(*args, is_causal=False, **kwargs)


def _mean_kept(norm: layers.LayerNorm, x: jax.Array) -> jax.Array:
    y = x * jax.lax.rsqrt(jnp.var(x, -1, keepdims=True) + norm.eps)
    return y * norm.scale[...] + norm.bias[...]


def _scale_plus_one(norm: layers.RMSNorm, x: jax.Array) -> jax.Array:
    y = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + norm.eps)
    return (1 + norm.scale[...]) * y  # as Gemma's


def _other_mean(tiles: jax.Array, mean: Any, std: Any) -> jax.Array:
    return normalise(tiles, (0.5, 0.5, 0.5), std)


PLANTS: dict[str, Plant] = {
    "rope pairs neighbours": lambda m: m.setattr(decoder, "apply_rope", _interleaved_rope),
    "rope turns backwards": lambda m: m.setattr(
        decoder, "apply_rope", lambda x, angles, scale: rope.apply_rope(x, -angles, scale)
    ),
    "positions stretched": lambda m: m.setattr(
        decoder,
        "rope_angles",
        lambda positions, frequency: rope.rope_angles(positions * 1.001, frequency),
    ),
    "newline dropped": lambda m: m.setattr(processor, "image_token_index", _without_newlines),
    "tiles swapped": lambda m: m.setattr(processor, "tile_image", _swapped_tiles),
    "tiles transposed": lambda m: m.setattr(processor, "tile_image", _transposed_tiles),
    "BGR": lambda m: m.setattr(processor, "tile_image", _swapped_channels),
    "width before height": lambda m: m.setattr(
        processor, "image_token_index", _size_as_width_height
    ),
    "kv heads in the wrong groups": lambda m: m.setattr(decoder, "attention", _tiled_kv_heads),
    "no causal mask": lambda m: m.setattr(decoder, "attention", _no_mask),
    "quick_gelu in the projector": lambda m: m.setattr(
        llava_next, "exact_gelu", vision_tower.quick_gelu
    ),
    "gelu for quick_gelu": lambda m: m.setitem(
        vision_tower.ACTIVATIONS, "quick_gelu", vision_tower.exact_gelu
    ),
    "mean kept in layer norm": lambda m: m.setattr(layers.LayerNorm, "__call__", _mean_kept),
    "norm scale plus one": lambda m: m.setattr(layers.RMSNorm, "__call__", _scale_plus_one),
    "other pixel mean": lambda m: m.setattr(vision_tower, "normalise", _other_mean),
}


@pytest.fixture(scope="module")
def expected_both(llava: Callable[[str], Case]) -> np.ndarray:
    return one_by_one(llava("llama-gqa"), BOTH)


def encode_unjitted(model: E5V) -> np.ndarray:
    """Operation by operation: what is compiled for one planted bug serves the next."""
    with jax.disable_jit():
        return model.encode(BOTH, batch_size=len(BOTH))


def test_no_bug_planted(llava: Callable[[str], Case], expected_both: np.ndarray) -> None:
    assert difference(encode_unjitted(llava("llama-gqa").load()), expected_both) <= 1e-5


@pytest.mark.parametrize("bug", PLANTS)
def test_planted_bugs_show(
    bug: str,
    llava: Callable[[str], Case],
    expected_both: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A mistake moves the embeddings by far more than the tolerance."""
    PLANTS[bug](monkeypatch)
    assert difference(encode_unjitted(llava("llama-gqa").load()), expected_both) > 1e-4


# --- config fields -------------------------------------------------------------------------------

TEXT_CHANGES: dict[str, list[Any]] = {
    "vocab_size": [278],
    "hidden_size": [128],
    "intermediate_size": [97],
    "num_hidden_layers": [2, 4],
    "num_attention_heads": [8],
    "num_key_value_heads": [4],
    "head_dim": [32],
    "rms_norm_eps": [0.01],
    "rope_theta": [400000.0],
    "max_position_embeddings": [50],
    "model_type": ["llama"],
    "qkv_bias": [True],
    "qk_norm": [True],
    "rope_scaling": [RopeScaling("linear", 4.0)],
    "mrope_section": [(3, 2, 2)],  # a right one shows only with positions: test_decoder.py
    "mrope_interleaved": [True],
    "sliding_window": [50],
}
VISION_CHANGES: dict[str, list[Any]] = {
    "hidden_size": [96],
    "intermediate_size": [81],
    "num_hidden_layers": [2, 4],
    "num_attention_heads": [6],
    "image_size": [56],
    "patch_size": [4, 14],
    "layer_norm_eps": [0.01],
    "hidden_act": ["gelu", "gelu_pytorch_tanh"],
    "model_type": ["siglip_vision_model", "dinov2", "vit"],
    "qkv_bias": [False],
    "use_swiglu_ffn": [True],
    "image_mean": [(0.5, 0.5, 0.5), (0.5, 0.5), [0.5, 0.5, 0.5]],
    "image_std": [(0.5, 0.5, 0.5), (0.5, 0.5, 0.0), 0.5],
}
MODEL_CHANGES: dict[str, list[Any]] = {
    "vision_feature_layer": [-1, -3, (-2, -3), (), (-2, 4), (-2, "1")],
    "image_token_id": [None, 0],
    "image_grid_pinpoints": [((28, 56),), ()],
    "max_tiles": [1, 0, -1, "2"],
    "spatial_pool_stride": [2, 0, 3, "1"],
}


def changed(config: LlavaNextConfig, section: str, field: str, value: Any) -> LlavaNextConfig:
    if section == "model":
        return dataclasses.replace(config, **{field: value})
    part = dataclasses.replace(getattr(config, section), **{field: value})
    return dataclasses.replace(config, **{section: part})


def test_every_config_field_is_listed() -> None:
    def names(cls: type) -> set[str]:
        return {f.name for f in dataclasses.fields(cls)}

    assert set(TEXT_CHANGES) == names(TextConfig)
    assert set(VISION_CHANGES) == names(VisionConfig)
    assert set(MODEL_CHANGES) | {"text", "vision"} == names(LlavaNextConfig)


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        (section, field, value)
        for section, changes in (
            ("text", TEXT_CHANGES),
            ("vision", VISION_CHANGES),
            ("model", MODEL_CHANGES),
        )
        for field, values in changes.items()
        for value in values
    ],
)
def test_every_config_field_matters(
    section: str,
    field: str,
    value: Any,
    llava: Callable[[str], Case],
    expected_both: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Loading or encoding refuses it by a message, or the embeddings change."""

    def open_changed(path: Path) -> HfSource:
        source = open_source(path)
        source.config = changed(source.config, section, field, value)
        return source

    open_source = e5v_jax.encode.e5v.open_source
    monkeypatch.setattr(e5v_jax.encode.e5v, "open_source", open_changed)
    # the model type decides the template where the tokenizer has no chat tokens
    case = llava("mistral" if field == "model_type" else "llama-gqa")
    try:
        found = encode_unjitted(case.load())
    except ValueError as error:
        assert "\n" not in str(error)
        return
    assert difference(found, expected_both) > 1e-4
