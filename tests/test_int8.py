"""int8 by int8: its arithmetic, its gradient, what a TPU gets, and how near the vectors stay."""

import csv
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hf_models import Recipe, build_llava
from PIL import Image
from qwix import QArray

from e5v_jax import E5V
from e5v_jax.nn.layers import Build, Linear, Precision
from e5v_jax.nn.quantized import (
    _dot,
    _dot_on_cpu,
    dense_kernel,
    quantize_kernel,
    quantized_matmul,
    rotate,
)
from e5v_jax.runtime import Runtime
from e5v_jax.sharding import make_mesh

EXACT = jax.lax.Precision.HIGHEST


@pytest.fixture(scope="module")
def operands() -> tuple[np.ndarray, QArray]:
    """Rows of very different size, one of zeros; a kernel."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 256)) * 10.0 ** rng.uniform(-3, 3, size=(40, 1))
    x[7] = 0
    kernel = quantize_kernel(jnp.asarray(rng.normal(size=(256, 48)), jnp.float32), "int8")
    return x.astype(np.float32), kernel


def reference(x: np.ndarray, kernel: QArray) -> np.ndarray:
    """In integers, one row after the other."""
    codes, scales = np.asarray(kernel.qvalue, np.int64), np.asarray(kernel.scale, np.float64)[0]
    rows = []
    for row in x.astype(np.float64):
        scale = np.abs(row).max() / 127 or 1.0
        rows.append((np.round(row / scale).astype(np.int64) @ codes) * scale * scales)
    return np.array(rows)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 1e-2)])
def test_is_the_sum_of_products_of_integers(
    operands: tuple[np.ndarray, QArray], dtype: Any, tolerance: float
) -> None:
    x, kernel = operands
    found = quantized_matmul(jnp.asarray(x, dtype), kernel, True, EXACT)
    assert found.dtype == dtype
    expected = reference(np.asarray(jnp.asarray(x, dtype), np.float32), kernel)
    size = np.maximum(np.linalg.norm(expected, axis=1, keepdims=True), 1e-9)
    assert (np.abs(np.asarray(found, np.float64) - expected) / size).max() < tolerance
    assert (np.asarray(found[7], np.float32) == 0).all()
    # rounding shows, and is small
    exact = x.astype(np.float64) @ np.asarray(dense_kernel(kernel, np.float32), np.float64)
    error = (np.abs(np.asarray(found, np.float64) - exact) / size).max()
    assert 1e-4 < error < 2e-2


def test_a_cpu_multiplies_the_same_numbers() -> None:
    rng = np.random.default_rng(1)
    codes, kernel = (
        jnp.asarray(rng.integers(-127, 128, size=size), jnp.int8) for size in ((9, 4096), (4096, 5))
    )
    np.testing.assert_allclose(_dot_on_cpu(codes, kernel), _dot(codes, kernel), rtol=0, atol=8)
    short = codes[:, :1000], kernel[:1000]  # sums below 2**24
    np.testing.assert_array_equal(_dot_on_cpu(*short), _dot(*short))


@pytest.mark.parametrize("width", [1, 6, 96, 128, 640])
def test_rotation_spreads_an_outlier_and_changes_nothing_else(width: int) -> None:
    """Products are those of before; one large channel becomes many; twice is once back."""
    rng = np.random.default_rng(3)
    x, kernel = (rng.normal(size=size).astype(np.float32) for size in ((9, width), (width, 5)))
    x[:, 0] = 1000
    turned = rotate(jnp.asarray(x), EXACT)
    size = min(128, width & -width)
    assert np.abs(turned[:, :size]).max() < 1000 / size**0.5 + 5
    products = turned @ np.asarray(rotate(jnp.asarray(kernel.T), EXACT)).T
    np.testing.assert_allclose(products, x @ kernel, rtol=1e-5, atol=2e-3)
    np.testing.assert_allclose(rotate(turned, EXACT), x, rtol=1e-5, atol=2e-4)
    # in 16 bits it loses what they do, and no common factor
    half = rotate(jnp.asarray(x, jnp.bfloat16), jax.lax.Precision.DEFAULT)
    assert half.dtype == jnp.bfloat16
    ratio = (np.asarray(half, np.float64) * turned).sum() / np.square(turned, dtype=float).sum()
    assert abs(ratio - 1) < 1e-3


def test_linear_maps_rotate_what_they_get_and_their_kernel() -> None:
    """With an outlier int8 is then four times nearer; what is left is mostly the kernel's."""
    rng = np.random.default_rng(4)
    x = rng.normal(size=(30, 256)).astype(np.float32)
    x[:, 7] = 100
    kernel = jnp.asarray(rng.normal(size=(256, 64)), jnp.float32)
    build = Build(Precision(jnp.float32, jnp.float32, "int8"), Runtime.on(make_mesh()))
    linear = Linear(256, 64, build, rngs=nnx.Rngs(0))
    linear.kernel.set_value(quantize_kernel(kernel, "int8"))
    exact = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)

    def error(found: Any) -> float:
        return float(np.linalg.norm(np.asarray(found) - exact) / np.linalg.norm(exact))

    plain = quantized_matmul(x, quantize_kernel(kernel, "int8_weight_only"), True, EXACT)
    assert error(linear(x)) < error(plain) / 4
    assert error(linear(x)) / 2 < error(linear(x, exact=True)) < error(linear(x))


def test_the_gradient_is_that_of_no_rounding(operands: tuple[np.ndarray, QArray]) -> None:
    x, kernel = operands
    weights = jnp.asarray(np.random.default_rng(2).normal(size=(40, 48)), jnp.float32)
    found = jax.grad(lambda x: jnp.sum(weights * quantized_matmul(x, kernel, True, EXACT)))(x)
    expected = np.asarray(weights) @ np.asarray(dense_kernel(kernel, np.float32)).T
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_other_chips_get_an_int8_matmul(operands: tuple[np.ndarray, QArray], platform: str) -> None:
    x, kernel = operands
    program = jax.jit(quantized_matmul, static_argnums=(2, 3))
    lowered = program.trace(jnp.asarray(x), kernel, True, EXACT)
    (line,) = (
        line
        for line in lowered.lower(lowering_platforms=(platform,)).as_text().splitlines()
        if "dot_general" in line
    )
    assert "(tensor<40x256xi8>, tensor<256x48xi8>) -> tensor<40x48xi32>" in line


@pytest.mark.slow
def test_vectors_of_real_weights_stay_near(smollm2_converted: Path, sts_data: Path) -> None:
    """The worst and the mean of 64 sentences; rounded activations show, though they are rotated."""
    with (sts_data / "STS" / "STSBenchmark" / "sts-test.csv").open() as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    texts = sorted({row[5] for row in rows})[:64]
    vectors = {}
    for kind in (None, "int8", "int8_weight_only"):
        model = E5V.from_pretrained(smollm2_converted, dtype="float32", quantize=kind)
        vectors[kind] = model.encode(texts)
    both, weights = (
        (vectors[kind] * vectors[None]).sum(axis=1) for kind in ("int8", "int8_weight_only")
    )
    for cosine in (both, weights):
        print(f"cosine: mean {cosine.mean():.5f}, least {cosine.min():.5f}")
    assert both.mean() >= 0.999 and both.min() >= 0.998
    assert both.mean() < weights.mean() < 1 and weights.min() >= 0.999


@pytest.mark.slow
def test_images_of_a_clip_base_stay_near(tmp_path: Path) -> None:
    """Random weights of CLIP-B's size before a small decoder: the tower multiplies in int8, too."""
    vision = {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
    }
    text = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 8}
    folder = build_llava(
        Recipe(template="chatml", vision=vision, text=text, seed=5), tmp_path
    ).folder
    rng = np.random.default_rng(0)
    images = [
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).resize((90, 60))
        for _ in range(6)
    ]
    exact, rounded, stored = (
        E5V.from_pretrained(folder, dtype="float32", quantize=kind).encode(images)
        for kind in (None, "int8", "int8_weight_only")
    )
    assert (rounded * exact).sum(axis=1).min() >= 0.99
    assert (rounded * exact).sum(axis=1).mean() < (stored * exact).sum(axis=1).mean() < 1
