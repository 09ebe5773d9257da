"""Each part of the model against transformers', fed with the same inputs, in fp32."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hf_models import Case, picture
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from e5v_jax.families.base import BatchShape
from e5v_jax.families.llava_next.model import ImageBatch
from e5v_jax.families.llava_next.tiling import NEWLINE, image_token_index, tile_image
from e5v_jax.nn.rope import apply_rope, rope_angles, rope_frequencies
from e5v_jax.prompts import choose_prompt

NAMES = ("llama-gqa", "mistral", "wide-heads", "vicuna")
SIZES = [(40, 56), (70, 45), (50, 50), (8, 200), (300, 5), (1, 1), (2, 900)]  # (height, width)


@dataclass
class Trace:
    """Inputs and outputs of every part of PyTorch's model for one image with text."""

    case: Case
    image: Any
    vision: list[torch.Tensor]  # hidden_states of the tower, [T, 1 + P, Dv] each
    inputs_embeds: torch.Tensor  # [1, L, D]
    layers: list[torch.Tensor]  # output of each decoder layer, [1, L, D]
    last: torch.Tensor  # after the final norm, [1, L, D]


@pytest.fixture(scope="module", params=NAMES)
def trace(request: pytest.FixtureRequest, llava: Callable[[str], Case]) -> Trace:
    case = llava(request.param)
    image = picture(61, 33)
    model = case.torch_model
    embeds: list[torch.Tensor] = []
    layers: list[torch.Tensor] = []
    decoder = model.model.language_model
    hooks = [
        decoder.register_forward_pre_hook(
            lambda _, args, kwargs: embeds.append(kwargs["inputs_embeds"]), with_kwargs=True
        ),
        *(
            layer.register_forward_hook(
                lambda _, args, out: layers.append(out if torch.is_tensor(out) else out[0])
            )
            for layer in decoder.layers
        ),
    ]
    inputs = case.torch_inputs([{"text": "make it blue", "image": image}])
    with torch.no_grad():
        tower = model.model.vision_tower(inputs["pixel_values"][0], output_hidden_states=True)
        last = model.model(**inputs).last_hidden_state
    for hook in hooks:
        hook.remove()
    assert len(embeds) == 1 and len(layers) == len(decoder.layers)
    return Trace(case, image, list(tower.hidden_states), embeds[0], layers, last)


def assert_close(ours: Any, theirs: torch.Tensor, *, tolerance: float = 1e-5) -> None:
    """Largest difference, relative to the largest value."""
    expected = theirs.detach().float().numpy()
    found = np.asarray(ours, np.float32)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


def tiles_of(case: Case, image: Any) -> np.ndarray:
    vision = case.e5v.config.vision
    assert vision is not None
    return tile_image(
        image,
        image_size=vision.image_size,
        grid_pinpoints=case.e5v.config.image_grid_pinpoints,
    ).tiles


@jax.jit
def run_layer(stack: Any, i: int, *args: Any) -> jax.Array:
    """One layer out of a stack; jitted once for all of a stack."""
    layer = jax.tree.map(lambda a: a[i], stack)
    return layer(*args)


@jax.jit
def run(module: Any, *args: Any) -> jax.Array:
    """A module, jitted: what is compared is what runs."""
    return module(*args)


def test_vision_tower(trace: Trace) -> None:
    module = trace.case.module
    found = run(module.vision_tower, tiles_of(trace.case, trace.image))  # [T, P, Dv]
    assert_close(found, trace.vision[-2][:, 1:])
    neighbours = (trace.vision[-1], trace.vision[-3])  # the layers it must not be
    for other in neighbours:
        assert np.abs(np.asarray(found) - other[:, 1:].numpy()).max() > 0.1


def test_each_vision_layer(trace: Trace) -> None:
    stack = trace.case.module.vision_tower.layers
    count = len(trace.vision) - 2  # the last block feeds nothing and is not kept
    assert stack.layer_norm1.scale.shape[0] == count
    for i in range(count):
        assert_close(run_layer(stack, i, trace.vision[i].numpy()), trace.vision[i + 1])


def test_projector(trace: Trace) -> None:
    features = trace.vision[-2][:, 1:]
    with torch.no_grad():
        expected = trace.case.torch_model.model.multi_modal_projector(features)
    found = run(trace.case.module.multi_modal_projector, features.numpy())
    assert_close(found, expected)


@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("name", NAMES)
def test_packing(name: str, size: tuple[int, int], llava: Callable[[str], Case]) -> None:
    """The same features in, the same sequence out, to the last bit."""
    case = llava(name)
    config = case.e5v.config
    assert config.vision is not None
    features = torch.randn(
        len(tiles_of(case, picture(*size))), config.vision.num_patches, config.text.hidden_size
    )
    model = case.torch_model.model
    newline = model.image_newline.detach()
    (expected,), _ = model.pack_image_features(
        [features], [list(size)], "default", image_newline=newline
    )
    index = image_token_index(
        size,
        grid_pinpoints=config.image_grid_pinpoints,
        image_size=config.vision.image_size,
        patch_size=config.vision.patch_size,
    )
    rows = torch.cat([features.flatten(0, 1), newline[None]])  # [T*P + 1, D]
    index = np.where(index == NEWLINE, len(rows) - 1, index)
    np.testing.assert_array_equal(rows.numpy()[index], expected.numpy(), strict=True)


def test_merge_of_a_batch(trace: Trace) -> None:
    """Text, tiles and newlines of several items land where PyTorch puts them."""
    case, e5v = trace.case, trace.case.e5v
    items = [{"text": "make it blue", "image": trace.image}, picture(40, 90), picture(30, 30)]
    measured = e5v.processor.measure(items, choose_prompt(None, None))
    prepared = [e5v.processor.load(item) for item in measured]
    length = max(item.length for item in measured) + 3
    tiles = max(item.shape_key for item in measured)
    stacked = e5v.processor.stack(prepared, BatchShape(len(items), length, tiles))
    batch = jax.tree.map(jnp.asarray, stacked)
    assert isinstance(batch, ImageBatch)
    found = np.asarray(jax.jit(lambda m, b: m.merge(b))(case.module, batch))  # [B, L, D]
    used = len(prepared[0].ids)
    assert_close(found[:1, :used], trace.inputs_embeds)
    embeds: list[torch.Tensor] = []
    hook = case.torch_model.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: embeds.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    with torch.no_grad():
        for item in items[1:]:
            case.torch_model.model(**case.torch_inputs([item]))
    hook.remove()
    for row, expected in enumerate(embeds, start=1):
        assert_close(found[row : row + 1, : expected.shape[1]], expected)


def test_each_decoder_layer(trace: Trace) -> None:
    decoder = trace.case.module.language_model
    cfg = decoder.cfg
    positions = jnp.arange(trace.inputs_embeds.shape[1])
    frequency = rope_frequencies(head_dim=cfg.head_dim, theta=cfg.rope_theta)
    angles = rope_angles(positions, frequency)
    before = trace.inputs_embeds
    for i, expected in enumerate(trace.layers):
        found = run_layer(decoder.layers, i, before.numpy(), angles, None)
        assert_close(found, expected)
        before = expected


def test_whole_decoder_and_final_norm(trace: Trace) -> None:
    decoder = trace.case.module.language_model
    hidden = run(decoder, trace.inputs_embeds.numpy())
    assert_close(hidden, trace.layers[-1])
    assert_close(run(decoder.norm, hidden), trace.last)


def test_token_embedding(trace: Trace) -> None:
    ids = np.array([[0, 5, 255, 258]], np.int32)
    with torch.no_grad():
        expected = trace.case.torch_model.get_input_embeddings()(torch.from_numpy(ids).long())
    np.testing.assert_array_equal(
        np.asarray(trace.case.module.language_model.embed(jnp.asarray(ids))), expected.numpy()
    )


@pytest.mark.parametrize("theta", [10000.0, 500000.0, 1e6])
@pytest.mark.parametrize("head_dim", [24, 128])
def test_rope_at_long_positions(theta: float, head_dim: int) -> None:
    """A large image is thousands of tokens: angles must be right there too, also for bf16."""
    length = 8192
    config = LlamaConfig(
        hidden_size=head_dim,
        num_attention_heads=1,
        head_dim=head_dim,
        max_position_embeddings=length,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
    )
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(length)[None])
    frequency = rope_frequencies(head_dim=head_dim, theta=theta)
    angles = np.asarray(rope_angles(jnp.arange(length), frequency))
    half = head_dim // 2
    assert np.abs(np.cos(angles) - cos[0, :, :half].numpy()).max() <= 1e-6
    assert np.abs(np.sin(angles) - sin[0, :, :half].numpy()).max() <= 1e-6
    x = torch.randn(1, 1, length, head_dim)  # [B, N, T, H]
    expected, _ = apply_rotary_pos_emb(x, x, cos, sin)
    ours = apply_rope(jnp.asarray(x.numpy().transpose(0, 2, 1, 3)), jnp.asarray(angles))
    assert_close(ours, expected.transpose(1, 2), tolerance=1e-6)
    ours = apply_rope(ours.astype(jnp.bfloat16), jnp.asarray(angles))
    expected, _ = apply_rotary_pos_emb(expected, expected, cos, sin)
    assert_close(ours, expected.transpose(1, 2), tolerance=0.02)
