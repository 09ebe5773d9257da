"""The quantised base of QLoRA: its codes, how it is loaded, and training on it."""

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hf_models import Recipe, build_text
from qwix import QArray
from scipy.linalg import hadamard
from test_train_step import LORA, flat, make_pair_batch, make_tokens, with_random_factors
from transformers import Qwen2Config, Qwen3Config

from e5v_jax.checkpoints.hf_source import open_source
from e5v_jax.checkpoints.loading import dotted, load_model
from e5v_jax.families.base import Model
from e5v_jax.nn.layers import Build, Precision
from e5v_jax.nn.nf4_tiles import NF4_TILE, dequantise_in_tiles
from e5v_jax.nn.quantized import Quantization, dense_kernel, quantize_kernel
from e5v_jax.runtime import Runtime
from e5v_jax.sharding import make_mesh
from e5v_jax.train.batches import group_lengths
from e5v_jax.train.config import LossConfig
from e5v_jax.train.step import PairBatch, pair_loss, split_trainable

# QLoRA (arXiv 2305.14314), appendix E: quantiles of a normal distribution, scaled to [-1, 1]
CODE_BOOK = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)
WIDE = Recipe(
    template="chatml",
    text={
        "vocab_size": 261,
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "initializer_range": 0.1,
    },
    seed=31,
)


def reference_nf4(kernel: np.ndarray) -> np.ndarray:
    """Dequantised NF4, one block of 64 inputs of one output after the other."""
    result = np.empty_like(kernel)
    for column in range(kernel.shape[1]):
        for start in range(0, kernel.shape[0], NF4_TILE):
            block = kernel[start : start + NF4_TILE, column]
            scale = np.abs(block).max()
            nearest = np.abs(block[:, None] / scale - CODE_BOOK).argmin(axis=1)
            result[start : start + NF4_TILE, column] = CODE_BOOK[nearest] * scale
    return result


def load(folder: Path, quantization: Quantization | None) -> Model:
    precision = Precision(param=np.float32, compute=np.float32, quantization=quantization)
    return load_model(open_source(folder), Build(precision, Runtime.on(make_mesh()), LORA), seed=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_text(WIDE, tmp_path_factory.mktemp("wide") / "hf").folder


@pytest.mark.parametrize("scale", [1.0, 1e-4, 300.0])
def test_nf4_is_the_published_one(scale: float) -> None:
    rng = np.random.default_rng(0)
    kernel = (scale * rng.standard_t(3, size=(256, 24))).astype(np.float32)
    stored = quantize_kernel(jnp.asarray(kernel), "nf4")
    assert stored.qvalue.dtype == jnp.uint4 and stored.qvalue.shape == kernel.shape
    assert stored.scale.dtype == jnp.float32 and stored.scale.shape == (4, 24)
    np.testing.assert_allclose(
        dense_kernel(stored, np.float32), reference_nf4(kernel), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(64, 128), (576, 200), (1088, 513)])
def test_tiles_have_the_bits_of_the_whole(shape: tuple[int, int], dtype: Any) -> None:
    """What Pallas makes on a TPU, here interpreted; the last tiles are not full."""
    kernel = np.random.default_rng(1).standard_t(3, size=shape).astype(np.float32)
    stored = quantize_kernel(jnp.asarray(kernel), "nf4")
    tiles = dequantise_in_tiles(stored.qvalue, stored.scale, dtype, interpret=True)
    assert tiles.dtype == dtype
    np.testing.assert_array_equal(tiles, dense_kernel(stored, dtype))


@pytest.mark.parametrize("quantization", ["int8_weight_only", "int8"])
def test_int8_is_within_half_a_step_of_each_output(quantization: Quantization) -> None:
    kernel = np.random.default_rng(0).normal(size=(96, 24)).astype(np.float32)
    stored = quantize_kernel(jnp.asarray(kernel), quantization)
    if quantization == "int8":
        kernel = rotated(kernel)
    assert stored.qvalue.dtype == jnp.int8 and stored.scale.shape == (1, 24)
    step = np.abs(kernel).max(axis=0) / 127.5
    error = np.abs(dense_kernel(stored, np.float32) - kernel)
    assert (error <= step / 2 * (1 + 1e-4)).all()
    assert error.max() > 0.4 * step.max()


def test_a_kernel_that_nf4_cannot_hold_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"nf4 needs kernels with a multiple of 64 inputs.* has 96"
    ):
        quantize_kernel(jnp.ones((96, 4)), "nf4")


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_loading_quantises_and_reports_its_error(
    folder: Path, quantization: Quantization, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="e5v_jax"):
        quantized, dense = load(folder, quantization), load(folder, None)
    kernels = dict(both(quantized, dense))
    assert len(kernels) == 7
    difference = sum(float(np.square(a - b).sum()) for a, b in kernels.values())
    norm = sum(float(np.square(b).sum()) for _, b in kernels.values())
    percent = 100 * (difference / norm) ** 0.5
    reports = [r.getMessage() for r in caplog.records if "relative error" in r.getMessage()]
    assert reports == [f"{quantization} kernels: relative error {percent:.2f} % (root mean square)"]
    assert percent == pytest.approx({"nf4": 9.2, "int8": 0.6}[quantization], rel=0.2)


@pytest.mark.parametrize("kind", [Qwen2Config, Qwen3Config])
def test_biases_and_norms_are_not_quantised(kind: Any, tmp_path: Path) -> None:
    folder = build_text(replace(WIDE, text_class=kind), tmp_path).folder
    quantized, dense = load(folder, "nf4"), load(folder, None)
    kernels = dict(both(quantized, dense))
    assert len(kernels) == 7
    state = {dotted(path): leaf for path, leaf in nnx.to_flat_state(nnx.state(quantized))}
    for path, leaf in nnx.to_flat_state(nnx.state(dense)):
        if (name := dotted(path)) not in kernels:
            np.testing.assert_array_equal(state[name][...], leaf[...], err_msg=name)


def both(quantized: Model, dense: Model) -> Iterator[tuple[str, tuple[np.ndarray, ...]]]:
    """Each kernel of the decoder, dequantised and as it was."""
    original = dict(nnx.to_flat_state(nnx.state(dense)))
    is_rotated = quantized.language_model.precision.quantization == "int8"
    for path, leaf in nnx.to_flat_state(nnx.state(quantized)):
        kernel = leaf.get_value()
        if isinstance(kernel, QArray):
            whole = np.asarray(jax.vmap(lambda k: dense_kernel(k, np.float32))(kernel))
            if is_rotated:  # back: the rotation is its own inverse
                whole = np.stack([rotated(one) for one in whole])
            yield dotted(path), (whole, np.asarray(original[path][...]))


def rotated(kernel: np.ndarray) -> np.ndarray:
    """Blocks of inputs of a kernel [in, out] times scipy's Hadamard matrix, in fp64."""
    size = min(128, len(kernel) & -len(kernel))
    blocks = kernel.reshape(-1, size, kernel.shape[1]).astype(np.float64)
    turned = np.einsum("ij,bjo->bio", hadamard(size) / size**0.5, blocks)
    return turned.reshape(kernel.shape).astype(np.float32)


def loss_and_gradients(
    model: Model, *, chunk_size: int | None = None
) -> tuple[float, dict[str, np.ndarray]]:
    graphdef, trainable, frozen = split_trainable(model, lora=True)
    batch = six_triplets()

    @jax.jit
    def call(trainable: nnx.State, frozen: nnx.State) -> tuple[jax.Array, nnx.State]:
        def loss(trainable: nnx.State) -> jax.Array:
            return pair_loss(
                nnx.merge(graphdef, trainable, frozen),
                batch,
                columns=3,
                loss=LossConfig(temperature=0.5),
                chunk_size=chunk_size,
                remat="none",
                dropout_key=None,
            )[0]

        return jax.value_and_grad(loss)(trainable)

    value, gradients = call(trainable, frozen)
    return float(value), flat(gradients)


def six_triplets() -> PairBatch:
    tokens = make_tokens(3)
    rows = np.arange(6)
    lengths = group_lengths(tokens.lengths, [rows], groups=1, multiple=6)
    return make_pair_batch(tokens, rows, lengths=lengths, multiple=6)


@pytest.mark.parametrize(
    "quantization", ["nf4", pytest.param("int8_weight_only", marks=pytest.mark.slow)]
)
def test_training_is_that_of_the_dequantised_weights(
    folder: Path, quantization: Quantization
) -> None:
    quantized = with_random_factors(load(folder, quantization))
    dense = with_random_factors(load(folder, None))
    exact = loss_and_gradients(dense)[0]
    values = {path: whole for path, (whole, _) in both(quantized, dense)}
    graphdef, state = nnx.split(dense)
    dense = nnx.merge(
        graphdef,
        nnx.from_flat_state(
            [
                (path, leaf.replace(jnp.asarray(values.get(dotted(path), leaf[...]))))
                for path, leaf in nnx.to_flat_state(state)
            ]
        ),
    )
    loss, gradients = loss_and_gradients(quantized)
    expected_loss, expected = loss_and_gradients(dense)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert loss != pytest.approx(exact, rel=1e-6)
    assert set(gradients) == set(expected) and len(expected) == 14  # a and b of seven maps
    for name, gradient in expected.items():
        norm = np.linalg.norm(gradient)
        assert np.linalg.norm(gradients[name] - gradient) <= 1e-5 * norm, name


@pytest.mark.slow
def test_no_layer_stays_dequantised(tmp_path: Path) -> None:
    """Temporary memory of a step without remat grows per layer by activations, not by kernels."""

    def temporary(layers: int) -> int:
        recipe = replace(
            WIDE,
            text={
                **WIDE.text,
                "hidden_size": 256,
                "intermediate_size": 1024,
                "head_dim": 64,
                "num_hidden_layers": layers,
            },
        )
        folder = build_text(recipe, tmp_path / f"hf-{layers}").folder
        graphdef, trainable, frozen = split_trainable(load(folder, "nf4"), lora=True)

        def loss(trainable: nnx.State, frozen: nnx.State) -> jax.Array:
            model = nnx.merge(graphdef, trainable, frozen)
            short = jax.tree.map(lambda x: x[:2, :4] if x.ndim > 1 else x[:2] % 4, batch)
            return jnp.sum(model(short, remat="none", dropout_key=None))

        batch = six_triplets().groups[0]
        analysis = jax.jit(jax.grad(loss)).lower(trainable, frozen).compile().memory_analysis()
        assert analysis is not None
        return int(analysis.temp_size_in_bytes)

    kernel_bytes = 4 * (256 * 256 * 2 + 256 * 128 * 2 + 3 * 256 * 1024)  # of one layer, in fp32
    # XLA's CPU backend unpacks the codes of all layers, a byte each: a quarter of that
    assert (temporary(6) - temporary(2)) / 4 < 0.4 * kernel_bytes
