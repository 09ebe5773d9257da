"""What only a GPU can show: its kernels, and whole models on it (make test-gpu)."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hf_models import Case, picture
from qwen_models import QWEN3_RECIPES, build_qwen3_vl

from e5v_jax.nn.attention import attention
from e5v_jax.nn.layers import Precision
from e5v_jax.nn.remat import Remat
from e5v_jax.runtime import Implementation, Runtime
from e5v_jax.sharding import make_mesh

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="there is no GPU here"),
]

TEXTS = ["A dog sits.", "Zwei Männer spielen Fußball 🎉 im Regen, and a third one watches them."]
IMAGES: list[Any] = [picture(70, 45), picture(40, 56), picture(8, 200), picture(1, 1)]


@pytest.mark.parametrize("kind", ["causal", "tiles", "patches"])
@pytest.mark.parametrize(("length", "head_dim"), [(768, 64), (2368, 128), (130, 80)])
def test_cudnn_attention_is_xlas(length: int, head_dim: int, kind: str) -> None:
    """Of a decoder, of CLIP, of padded patches: both in bf16, held against XLA's in fp32."""
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, g = (
        jax.random.normal(key, (2, length, n, head_dim), jnp.bfloat16)
        for key, n in zip(keys, (8, 2, 2, 8), strict=True)
    )
    lengths = jnp.array([length - 50, length], jnp.int32) if kind == "patches" else None
    real = jnp.arange(length) < jnp.array([[length - 50 * (kind == "patches")], [length]])
    g = jnp.where(real[..., None, None], g, 0)

    def run(implementation: Implementation, dtype: Any) -> list[np.ndarray]:
        runtime = Runtime.on(make_mesh(devices=jax.devices()[:1]), implementation)

        def compute(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            out = attention(
                q,
                k,
                v,
                is_causal=kind == "causal",
                key_lengths=lengths,
                precision=Precision(dtype, dtype),
                runtime=runtime,
            )
            return jnp.where(real[..., None, None], out, 0)

        out, pull = jax.vjp(jax.jit(compute), *(x.astype(dtype) for x in (q, k, v)))
        return [np.asarray(x, np.float32) for x in (out, *pull(g.astype(dtype)))]

    exact = run("xla", jnp.float32)
    found = run("cudnn", jnp.bfloat16)
    errors = [
        float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in zip(found, exact, strict=True)
    ]
    assert max(errors) < 1e-2, errors  # bf16 has 8 bits


@pytest.mark.parametrize("remat", ["offload_dots", "offload_dots_except_mlp", "offload_full"])
def test_offloading_has_the_gradient_of_keeping(remat: Remat, llava: Callable[[str], Case]) -> None:
    graphdef, state = nnx.split(llava("llama-gqa").module.language_model)
    width = nnx.merge(graphdef, state).cfg.hidden_size
    x = jax.random.normal(jax.random.key(0), (2, 64, width))

    @partial(jax.jit, static_argnums=1)
    def gradient(state: nnx.State, remat: Remat) -> nnx.State:
        def loss(state: nnx.State) -> jax.Array:
            return jnp.sum(jnp.square(nnx.merge(graphdef, state)(x, remat=remat)))

        return jax.grad(loss)(state)

    kept, moved = gradient(state, "dots"), gradient(state, remat)
    for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(moved), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-6 * float(jnp.abs(a).max()))


@pytest.mark.parametrize("name", ["llama-gqa", "mistral"])
def test_models_equal_torch(name: str, llava: Callable[[str], Case]) -> None:
    case = llava(name)
    items: list[Any] = [*TEXTS, *IMAGES, {"text": "at night", "image": picture(20, 90)}]
    expected = np.concatenate([case.torch_embed([item]) for item in items])
    assert np.abs(case.load("float32").encode(items) - expected).max() <= 1e-5
    cosines = (case.load("bfloat16").encode(items) * expected).sum(axis=1)
    assert cosines.min() >= 0.999


def test_native_resolution_equals_torch(tmp_path: Path) -> None:
    """Qwen3-VL; in bf16 its tower and decoder run on cuDNN with a padding mask."""
    case = build_qwen3_vl(QWEN3_RECIPES["tied"], tmp_path)
    case.max_tokens = 50  # all images in the smallest bucket: one program
    items: list[Any] = [TEXTS[0], *IMAGES, {"text": "at night", "image": picture(20, 90)}]
    expected = case.torch_embed(items)
    assert np.abs(case.load("float32").encode(items) - expected).max() <= 1e-5
    cosines = (case.load("bfloat16").encode(items) * expected).sum(axis=1)
    assert cosines.min() >= 0.999
