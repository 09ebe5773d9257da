"""The decoder on its own against transformers': rope types, Qwen's biases and norms, M-RoPE."""

import copy
import dataclasses
import json
import re
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from hf_models import randomise
from transformers import (
    LlamaConfig,
    LlamaModel,
    MistralConfig,
    MistralModel,
    Qwen2Config,
    Qwen2Model,
    Qwen3Config,
    Qwen3Model,
)
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLTextConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLTextModel
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextModel

from e5v_jax.nn.config import UnsupportedModelError
from e5v_jax.nn.decoder import Decoder, Deepstack, decoder_parameters
from e5v_jax.nn.layers import Build, Precision
from e5v_jax.nn.parameters import Parameter
from e5v_jax.nn.remat import Remat
from e5v_jax.nn.rope import mrope_axes, rope_frequencies
from e5v_jax.nn.text_config import TextConfig
from e5v_jax.runtime import Runtime
from e5v_jax.sharding import make_mesh

ORIGINAL, LONGEST, LENGTH = 64, 512, 200
"""Positions first trained on, allowed, and tried: far enough that scaling shows."""
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": ORIGINAL}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": ORIGINAL}
SCALED: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 3.7},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "llama3": LLAMA3,
    "llama3 wide": {**LLAMA3, "low_freq_factor": 0.5, "high_freq_factor": 7, "factor": 32},
    "yarn": YARN,
    "yarn betas": {**YARN, "beta_fast": 16.5, "beta_slow": 0.7, "truncate": False},
    "yarn mscale": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3},
    "yarn one mscale": {**YARN, "mscale": 0.7},
    "yarn attention": {**YARN, "attention_factor": 1.21, "factor": None},
}
MODELS: dict[str, tuple[type[Any], type[Any], dict[str, Any]]] = {
    **{
        name: (LlamaConfig, LlamaModel, {"rope_parameters": {"rope_theta": 1e4, **rope}})
        for name, rope in SCALED.items()
    },
    "old spelling": (
        LlamaConfig,
        LlamaModel,
        {"rope_scaling": {"type": "linear", "factor": 2}, "rope_theta": 10000},
    ),
    "mistral window": (MistralConfig, MistralModel, {"sliding_window": LENGTH}),
    "qwen2": (Qwen2Config, Qwen2Model, {}),
    "qwen2 yarn": (Qwen2Config, Qwen2Model, {"rope_parameters": {"rope_theta": 1e6, **YARN}}),
    "qwen3": (Qwen3Config, Qwen3Model, {"head_dim": 24}),
}
CHUNKED = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
VISION_MODELS: dict[str, tuple[type[Any], type[Any], dict[str, Any]]] = {
    "qwen2_vl": (
        Qwen2VLTextConfig,
        Qwen2VLTextModel,
        {"rope_parameters": {**CHUNKED, "type": "mrope"}},
    ),
    "qwen2_5_vl": (
        Qwen2_5_VLTextConfig,
        Qwen2_5_VLTextModel,
        {"rope_parameters": {**YARN, **CHUNKED, "rope_type": "yarn"}},
    ),
    "qwen3_vl": (
        Qwen3VLTextConfig,
        Qwen3VLTextModel,
        {
            "head_dim": 24,
            "rope_parameters": {**CHUNKED, "mrope_section": [4, 5, 3], "mrope_interleaved": True},
        },
    ),
}


def build(cls: type[Any], text: dict[str, Any]) -> Any:
    options: dict[str, Any] = {
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 0.02,
        "max_position_embeddings": LONGEST,
        "attn_implementation": "eager",
    }
    return cls(**{**options, **text})


@cache
def torch_model(name: str) -> Any:
    config_class, model_class, text = {**MODELS, **VISION_MODELS}[name]
    model = model_class(build(config_class, text)).eval()
    randomise(model, seed=len(name))
    return model


def rows_of(cfg: TextConfig) -> dict[str, Parameter]:
    return {row.path.removeprefix("language_model."): row for row in decoder_parameters(cfg)}


def decoder_of(model: Any, dtype: Any = np.float32, **changes: Any) -> Decoder:
    """Our decoder with the parameters of transformers' text model."""
    cfg = dataclasses.replace(TextConfig.from_hf(model.config), **changes)
    decoder = Decoder(
        cfg, Build(Precision(dtype, dtype), Runtime.on(make_mesh())), rngs=nnx.Rngs(0)
    )
    rows = rows_of(cfg)
    tensors = {key: tensor.numpy() for key, tensor in model.state_dict().items()}
    for path, leaf in nnx.to_flat_state(nnx.state(decoder)):
        row = rows[".".join(map(str, path))]
        keys = [row.hf.replace("{i}", str(i)) for i in range(row.layers or 1)]
        arrays = [row.from_hf(tensors.pop(key)) for key in keys]
        leaf.set_value(jnp.asarray(np.stack(arrays) if row.layers else arrays[0], dtype))
    assert not tensors
    return decoder


def call(decoder: Decoder, x: Any, remat: Remat = "none", **inputs: Any) -> jax.Array:
    """All hidden states after the final norm, fp32 [B, T, D]."""
    return decoder.norm(decoder(x, remat=remat, **inputs)).astype(jnp.float32)


run = jax.jit(call, static_argnames="remat")


@jax.jit
def run_both(decoder: Decoder, x: Any, index: Any, **inputs: Any) -> tuple[jax.Array, jax.Array]:
    """And those at ``index``, which is one program to compile."""
    return call(decoder, x, **inputs), decoder.norm(decoder.at(x, index, **inputs))


def embeddings(length: int = LENGTH, rows: int = 2) -> np.ndarray:
    return np.random.default_rng(7).normal(size=(rows, length, 64)).astype(np.float32)


def unit(x: Any) -> np.ndarray:
    x = np.asarray(x, np.float64)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def difference(ours: Any, theirs: Any) -> float:
    """Of the normalised vectors, the largest."""
    assert ours.shape == theirs.shape
    return float(np.abs(unit(ours) - unit(theirs)).max())


@torch.no_grad()
def reference(name: str, x: np.ndarray, **inputs: Any) -> np.ndarray:
    model = torch_model(name)
    return model(inputs_embeds=torch.from_numpy(x), **inputs).last_hidden_state.numpy()


# --- decoders of text ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_equals_transformers(name: str) -> None:
    """Every position; `at` is the same; without the option it would be something else."""
    x, decoder = embeddings(), decoder_of(torch_model(name))
    expected = reference(name, x)
    index = np.array([LENGTH - 1, LENGTH // 3], np.int32)
    found, pooled = run_both(decoder, x, index)
    assert difference(found, expected) <= 1e-5
    assert difference(pooled, expected[[0, 1], index]) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["yarn", "qwen2", "qwen3_vl"])
def test_bf16(name: str) -> None:
    x = embeddings()
    cosine = unit(run(decoder_of(torch_model(name), jnp.bfloat16), x)) * unit(reference(name, x))
    assert 0.999 <= cosine.sum(-1).min() < 1 - 1e-6


@torch.no_grad()
def test_each_option_shows() -> None:
    """What the tests above compare is far from the model without it."""
    x = embeddings(length=120, rows=1)
    for config_class, model_class, theta in (
        (LlamaConfig, LlamaModel, 1e4),
        (Qwen2Config, Qwen2Model, 1e6),
    ):
        plain = {"rope_type": "default", "rope_theta": theta}
        model = model_class(build(config_class, {"rope_parameters": plain})).eval()
        for name, (kind, _, text) in MODELS.items():
            scaled = {"rope_parameters", "rope_scaling"} & text.keys() and name != "dynamic"
            if kind is config_class and scaled:
                model.load_state_dict(torch_model(name).state_dict())
                other = model(inputs_embeds=torch.from_numpy(x)).last_hidden_state.numpy()
                assert difference(other, reference(name, x)) > 1e-3, name
    for change in ("q_proj.bias", "k_proj.bias", "v_proj.bias", "q_norm.weight", "k_norm.weight"):
        name = "qwen2" if change.endswith("bias") else "qwen3"
        model = copy.deepcopy(torch_model(name))
        for layer in model.layers:
            layer.self_attn.get_parameter(change).fill_(change.endswith("weight"))
        other = model(inputs_embeds=torch.from_numpy(x)).last_hidden_state.numpy()
        assert difference(other, reference(name, x)) > 1e-3, change


# --- positions and features of images ------------------------------------------------------------


def image_positions(rows: int = 2) -> np.ndarray:
    """int32 [B, L, 3] as of texts around images: text counts up, image tokens are on a grid."""
    found = np.zeros((rows, LENGTH, 3), np.int32)
    for row, (start, height, width) in enumerate([(20, 6, 9), (3, 11, 4)]):
        tokens = height * width
        grid = np.stack(np.mgrid[0:1, 0:height, 0:width], axis=-1).reshape(tokens, 3)
        found[row, :start] = np.arange(start)[:, None]
        found[row, start : start + tokens] = start + grid
        after = start + max(height, width)
        rest = LENGTH - start - tokens
        found[row, start + tokens :] = after + np.arange(rest)[:, None]
    return found


@pytest.mark.parametrize("name", VISION_MODELS)
def test_positions_equal_transformers(name: str) -> None:
    x, positions = embeddings(), image_positions()
    decoder = decoder_of(torch_model(name))
    expected = reference(name, x, position_ids=torch.from_numpy(positions.transpose(2, 0, 1)))
    index = np.array([LENGTH - 1, 30], np.int32)
    found, pooled = run_both(decoder, x, index, positions=positions)
    assert difference(found, expected) <= 1e-5
    assert difference(pooled, expected[[0, 1], index]) <= 1e-5
    plain = run(decoder, x)
    assert difference(plain, reference(name, x)) <= 1e-5
    assert difference(plain, expected) > 1e-2
    counted = np.broadcast_to(np.arange(LENGTH, dtype=np.int32)[None, :, None], positions.shape)
    found, _ = run_both(decoder, x, index, positions=counted)  # no new program
    assert difference(found, plain) <= 1e-6


def test_axes_are_the_published_ones() -> None:
    chunked = [0] * 16 + [1] * 24 + [2] * 24
    interleaved = [i % 3 if i < 60 else 0 for i in range(64)]
    assert mrope_axes((16, 24, 24), interleaved=False).tolist() == chunked
    assert mrope_axes((24, 20, 20), interleaved=True).tolist() == interleaved


@pytest.mark.parametrize("count", [2, 3], ids=["two layers", "every layer"])
def test_deepstack_equals_transformers(count: int) -> None:
    """Both ways through the layers, also where the pooled token is an image's."""
    name = "qwen3_vl"
    x, positions = embeddings(), image_positions()
    tokens = 54
    features = np.random.default_rng(3).normal(size=(2, count, tokens, 64)).astype(np.float32)
    image_index = np.full((2, LENGTH), -1, np.int32)
    image_index[0, 20 : 20 + 54] = np.arange(54)
    image_index[1, 3 : 3 + 44] = np.arange(44)
    mask = image_index >= 0
    expected = reference(
        name,
        x,
        position_ids=torch.from_numpy(positions.transpose(2, 0, 1)),
        visual_pos_masks=torch.from_numpy(mask),
        deepstack_visual_embeds=[
            torch.from_numpy(np.concatenate([features[0, j], features[1, j, :44]]))
            for j in range(count)
        ],
    )
    decoder = decoder_of(torch_model(name))
    given = {"positions": positions, "deepstack": Deepstack(features, image_index)}
    for index in ([LENGTH - 1, 60], [30, 20]):
        found, pooled = run_both(decoder, x, np.array(index, np.int32), **given)
        assert difference(found, expected) <= 1e-5
        assert difference(pooled, expected[[0, 1], index]) <= 1e-5
    without = reference(name, x, position_ids=torch.from_numpy(positions.transpose(2, 0, 1)))
    assert difference(without, expected) > 1e-2


@pytest.mark.parametrize(
    ("name", "arrays", "modes"),
    [
        pytest.param("qwen2", 37, ("dots",), marks=pytest.mark.slow),
        ("qwen3_vl", 34, ("none", "full")),
    ],
)
def test_gradients_equal_torch(name: str, arrays: int, modes: tuple[Remat, ...]) -> None:
    """Of every parameter, those of biases and head norms among them, and of image features.

    What a backward pass keeps of the layers changes nothing.
    """
    x = embeddings(length=24)
    weights = np.random.default_rng(5).normal(size=x.shape).astype(np.float32)
    features = np.random.default_rng(3).normal(size=(2, 2, 7, 64)).astype(np.float32)
    image_index = np.full((2, 24), -1, np.int32)
    image_index[:, 4:11] = np.arange(7)
    has_images = name == "qwen3_vl"
    model = torch_model(name)
    model.zero_grad()
    visual = torch.from_numpy(features).requires_grad_()
    images = {
        "visual_pos_masks": torch.from_numpy(image_index >= 0),
        "deepstack_visual_embeds": [visual[:, j].reshape(14, 64) for j in range(2)],
    }
    out = model(inputs_embeds=torch.from_numpy(x), **(images if has_images else {}))
    (out.last_hidden_state * torch.from_numpy(weights)).sum().backward()
    expected = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    rows = rows_of(TextConfig.from_hf(model.config))
    graphdef, state = nnx.split(decoder_of(model))

    def loss(state: nnx.State, features: Any, remat: Remat) -> jax.Array:
        deepstack = Deepstack(features, image_index) if has_images else None
        found = call(nnx.merge(graphdef, state), x, remat, deepstack=deepstack)
        return jnp.sum(found * weights)

    for remat in modes:
        gradients = jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=2)
        found, of_features = gradients(state, features, remat)
        if has_images:
            theirs = visual.grad.numpy()
            assert np.abs(of_features - theirs).max() <= 1e-5 * np.abs(theirs).max()
        compared = 0
        for path, leaf in nnx.to_flat_state(found):
            row = rows[".".join(map(str, path))]
            for i in range(row.layers or 1):
                grad = expected.get(row.hf.replace("{i}", str(i)))
                if grad is None:
                    continue
                compared += 1
                ours = np.asarray(leaf[...][i] if row.layers else leaf[...])
                error = np.abs(ours - row.from_hf(grad.numpy())).max() / grad.abs().max()
                assert error <= 1e-4, (remat, path, i)
        assert compared == len(expected) == arrays


# --- frequencies and configurations --------------------------------------------------------------


@pytest.mark.parametrize("name", ["default", *SCALED])
def test_frequencies_equal_transformers(name: str) -> None:
    """To the last bit, and the factor of cos and sin."""
    scaled = SCALED.get(name, {"rope_type": "default"})
    for head_dim in (6, 16, 64, 128, 256):  # of others PyTorch's last bit depends on the CPU
        for theta in (1e4, 10000.1, 150000.0, 5e5, 1e6, 5e6):
            config = build(
                LlamaConfig,
                {"head_dim": head_dim, "rope_parameters": {**scaled, "rope_theta": theta}},
            )
            theirs = LlamaRotaryEmbedding(config)
            cfg = TextConfig.from_hf(config)
            found = rope_frequencies(head_dim=head_dim, theta=theta, scaling=cfg.rope_scaling)
            np.testing.assert_array_equal(found, theirs.inv_freq.numpy(), strict=True)
            factor = (cfg.rope_scaling and cfg.rope_scaling.attention_factor) or 1.0
            assert factor == theirs.attention_scaling


def test_the_window_does_not_matter_up_to_its_length() -> None:
    """And does from the next token on, which is why longer inputs are refused."""
    decoder = decoder_of(torch_model("mistral window"))
    assert (decoder.cfg.sliding_window, decoder.cfg.max_length) == (LENGTH, LENGTH)
    x = embeddings(LENGTH + 1, rows=1)
    change = np.abs(unit(run(decoder, x)) - unit(reference("mistral window", x))).max(-1)[0]
    assert change[:LENGTH].max() <= 1e-5 < 1e-4 < change[LENGTH]


def test_windows_are_read_where_they_are_used() -> None:
    def window(cls: type[Any], **text: Any) -> int | None:
        rope = CHUNKED if "VL" in cls.__name__ else {"rope_type": "default", "rope_theta": 1e4}
        return TextConfig.from_hf(build(cls, {"rope_parameters": {**rope}, **text})).sliding_window

    used = {"use_sliding_window": True, "sliding_window": 32}
    for cls in (Qwen2Config, Qwen3Config, Qwen2VLTextConfig, Qwen2_5_VLTextConfig):
        assert window(cls) is None
        assert window(cls, **{**used, "use_sliding_window": False}) is None
        assert window(cls, **used, max_window_layers=3) is None  # from layer 3 of 3
        assert window(cls, **used, max_window_layers=2) == 32
        assert window(cls, **used, layer_types=["full_attention"] * 3) is None
        mixed = ["full_attention", "sliding_attention", "full_attention"]
        assert window(cls, **used, layer_types=mixed) == 32
        with pytest.raises(UnsupportedModelError, match="layer_types has 'sliding_attention'"):
            window(cls, layer_types=mixed)
    assert window(MistralConfig) == 4096
    assert window(MistralConfig, sliding_window=None) is None


@pytest.mark.parametrize(
    ("cls", "text", "message"),
    [
        *(
            (LlamaConfig, {"rope_parameters": {"rope_theta": 1e4, **rope}}, message)
            for rope, message in [
                (
                    {"rope_type": "longrope", "factor": 2.0, "short_factor": [1.0] * 8,
                     "long_factor": [1.0] * 8, "original_max_position_embeddings": 64},
                    "rope_type 'longrope' is not supported: expected one of default, dynamic,",
                ),
                ({"rope_type": "mrope"}, "rope_type 'mrope' is not supported"),
                ({**YARN, "finetuned": True}, "rope_parameters has 'finetuned', which is not"),
                ({"mrope_section": [2, 3, 3]}, "rope_parameters has 'mrope_section'"),
                ({"factor": 2.0}, "rope_parameters has 'factor', which is not supported with"),
                ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5: only 1 is"),
                ({"rope_type": "linear", "type": "dynamic", "factor": 2.0}, "but type is 'dyn"),
                ({"rope_type": "linear", "factor": "2"}, "factor is '2': expected a number fro"),
                ({"rope_type": "linear", "factor": True}, "factor is True: expected a number"),
                ({"rope_type": "linear", "factor": 0.5}, "factor is 0.5: expected a number from"),
                ({"rope_type": "dynamic", "factor": float("nan")}, "factor is nan: expected a"),
                ({**LLAMA3, "low_freq_factor": 4.0}, "low_freq_factor is 4.0: expected less"),
                ({**LLAMA3, "original_max_position_embeddings": 6.5}, "is 6.5: expected a whole"),
                ({**YARN, "attention_factor": -1.0}, "attention_factor is -1.0: expected a"),
                ({**YARN, "truncate": None}, "truncate is None: expected true or false"),
                ({**YARN, "mscale": "x", "mscale_all_dim": 1.0}, "mscale is 'x': expected a"),
                ({**YARN, "rope_theta": 1.0}, "rope_theta is 1: 'yarn' needs a larger one"),
            ]
        ),
        (LlamaConfig, {"is_causal": False}, "is_causal is False: only True is supported"),
        (LlamaConfig, {"attention_bias": True}, "attention_bias is True: only False is"),
        (LlamaConfig, {"hidden_act": "gelu"}, "hidden_act is 'gelu': only 'silu' is supported"),
        (LlamaConfig, {"mlp_bias": True}, "mlp_bias is True: only False is supported"),
        (LlamaConfig, {"sliding_window": 64}, "sliding_window is 64: only None is supported"),
        (MistralConfig, {"sliding_window": 0}, "sliding_window is 0: expected a whole number"),
        (Qwen2Config, {"attention_bias": False}, "attention_bias is False: only True is"),
        (Qwen3Config, {"attention_bias": True}, "attention_bias is True: only False is"),
        (Qwen3VLTextConfig, {"sliding_window": 64}, "sliding_window is 64: only None is"),
        (Qwen2VLTextConfig, {"head_dim": 32}, "head_dim is 32: only hidden_size / num_att"),
        (Qwen2VLTextConfig, {}, "mrope_section is [16, 24, 24]: expected three sizes whose sum"),
        (
            Qwen3VLTextConfig,
            {"rope_parameters": {**CHUNKED, "mrope_interleaved": False}, "head_dim": 16},
            "mrope_interleaved: only True is supported",
        ),
        (
            Qwen3VLTextConfig,
            {"rope_parameters": {**CHUNKED, "mrope_section": [4, 4]}, "head_dim": 16},
            "mrope_section is [4, 4]: expected three sizes whose sum is half of head_dim, 8",
        ),
        (
            Qwen2VLTextConfig,
            {"rope_parameters": {**CHUNKED, "mrope_section": "sixteen"}},
            "mrope_section is 'sixteen': expected three sizes",
        ),
    ],
)  # fmt: skip
def test_unsupported_options(cls: type[Any], text: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        TextConfig.from_hf(build(cls, text))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


def test_configurations_survive_their_folder() -> None:
    """As config.json of a converted folder holds them; what a folder cannot mean is refused."""
    for name in ("yarn betas", "llama3", "qwen2", "qwen3", "qwen3_vl", "mistral window"):
        cfg = TextConfig.from_hf(torch_model(name).config)
        data = json.loads(json.dumps(dataclasses.asdict(cfg)))
        assert TextConfig.from_dict(data) == cfg
    for change, message in [
        ({"rope_scaling": 4.0}, "model.text.rope_scaling is 4.0: expected an object"),
        ({"rope_scaling": {"rope_type": "linear"}}, "model.text.rope_scaling has no 'factor'"),
        ({"rope_scaling": {"rope_type": "ntk", "factor": 2.0}}, "rope_type is 'ntk': expected"),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta_fast": 1.0}},
            "beta_fast is 1.0: 'linear' has no such number",
        ),
        ({"mrope_section": 8}, "mrope_section is 8: expected three sizes"),
        ({"mrope_interleaved": True}, "mrope_interleaved is true, but there is no mrope_section"),
        ({"qkv_bias": 1}, "qkv_bias is 1: expected true or false"),
        ({"sliding_window": 1.5}, "sliding_window is 1.5: expected a whole number"),
    ]:
        with pytest.raises(ValueError, match=re.escape(message)):
            TextConfig.from_dict({**data, **change})


def test_too_many_features() -> None:
    decoder = decoder_of(torch_model("qwen3_vl"))
    deepstack = Deepstack(jnp.zeros((2, 4, 1, 64)), jnp.full((2, 8), -1))
    with pytest.raises(ValueError, match="features for 4 layers: the decoder has 3"):
        decoder(jnp.asarray(embeddings(8)), deepstack=deepstack)
