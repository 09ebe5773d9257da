"""Attention: every implementation computes the same, and which one is chosen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e5v_jax.nn import attention as module
from e5v_jax.nn.attention import attention
from e5v_jax.nn.layers import Precision
from e5v_jax.runtime import Implementation, Runtime
from e5v_jax.sharding import make_mesh

FP32 = Precision(jnp.float32, jnp.float32)


def on(implementation: Implementation) -> Runtime:
    """On a CPU; splash as on a TPU, in Pallas's interpret mode."""
    mesh = make_mesh()
    return (
        Runtime(mesh, "tpu", "splash")
        if implementation == "splash"
        else Runtime.on(mesh, implementation)
    )


def qkv(t: int = 256, heads: int = 4, kv_heads: int = 2, h: int = 128) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(0), 3)
    return [
        jax.random.normal(key, (2, t, n, h))
        for key, n in zip(keys, (heads, kv_heads, kv_heads), strict=True)
    ]


def run(implementation: Implementation, arrays: list[jax.Array]) -> np.ndarray:
    def compute(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attention(q, k, v, is_causal=True, precision=FP32, runtime=on(implementation))

    return np.asarray(jax.jit(compute)(*arrays))


def expected(q: jax.Array, k: jax.Array, v: jax.Array) -> np.ndarray:
    """Head by head in NumPy, fp64."""
    out = np.zeros(q.shape)
    for b, n in np.ndindex(q.shape[0], q.shape[2]):
        group = n // (q.shape[2] // k.shape[2])
        queries, keys, values = (
            np.asarray(x[b, :, i], np.float64) for x, i in ((q, n), (k, group), (v, group))
        )
        logits = queries @ keys.T / np.sqrt(q.shape[3])
        logits[np.triu_indices(len(logits), 1)] = -np.inf
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        out[b, :, n] = weights @ values / weights.sum(axis=1, keepdims=True)
    return out


@pytest.mark.parametrize("implementation", ["xla", "splash"])
def test_grouped_heads_and_causal_mask(implementation: Implementation) -> None:
    arrays = qkv()
    np.testing.assert_allclose(run(implementation, arrays), expected(*arrays), atol=3e-6)


def test_key_lengths() -> None:
    """Keys from there on are not seen, by one query or by all."""
    for implementation, queries, t, h in (
        ("xla", 1, 8, 16),
        ("splash", 1, 8, 16),
        ("xla", 300, 300, 16),
        ("splash", 200, 200, 80),
    ):
        q, k, v = qkv(t=t, h=h)
        lengths = jnp.array([3, t])
        runtime = on(implementation)  # type: ignore[arg-type]  # a str to mypy
        found = attention(
            q[:, :queries],
            k,
            v,
            is_causal=False,
            key_lengths=lengths,
            precision=FP32,
            runtime=runtime,
        )
        assert np.isfinite(found).all()
        for b in range(2):
            cut = slice(int(lengths[b]))
            alone = attention(
                q[b : b + 1, :queries][:, cut],
                k[b : b + 1, cut],
                v[b : b + 1, cut],
                is_causal=False,
                precision=FP32,
                runtime=on("xla"),
            )
            np.testing.assert_allclose(found[b][cut], alone[0], atol=2e-6)


def test_key_lengths_are_not_for_causal_attention() -> None:
    with pytest.raises(ValueError, match="takes no key_lengths"):
        attention(
            *qkv(t=8),
            is_causal=True,
            key_lengths=jnp.array([3, 8]),
            precision=FP32,
            runtime=on("xla"),
        )


@pytest.mark.parametrize(
    ("backend", "dtype", "t", "h", "causal", "masked"),
    [
        ("cpu", jnp.bfloat16, 256, 128, "xla", "xla"),
        ("gpu", jnp.bfloat16, 256, 128, "cudnn", "cudnn"),
        ("gpu", jnp.bfloat16, 768, 72, "cudnn", "cudnn"),
        ("gpu", jnp.bfloat16, 577, 64, "xla", "xla"),
        ("gpu", jnp.float32, 256, 128, "xla", "xla"),  # cuDNN has no fp32
        ("gpu", jnp.bfloat16, 40, 128, "xla", "xla"),
        ("gpu", jnp.bfloat16, 256, 256, "xla", "xla"),
        ("tpu", jnp.bfloat16, 256, 128, "splash", "xla"),
        ("tpu", jnp.float32, 2944, 128, "splash", "splash"),
        ("tpu", jnp.bfloat16, 40, 128, "xla", "xla"),
        ("tpu", jnp.bfloat16, 2048, 72, "xla", "splash"),
        ("tpu", jnp.bfloat16, 7200, 72, "xla", "splash"),
    ],
)
def test_choice(backend: str, dtype: jnp.dtype, t: int, h: int, causal: str, masked: str) -> None:
    q = jax.ShapeDtypeStruct((1, t, 4, h), dtype)
    assert module._choose(q, backend, is_causal=True, is_masked=False) == causal
    assert module._choose(q, backend, is_causal=False, is_masked=True) == masked


def test_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="'flash': expected one of auto, xla, cudnn, splash"):
        on("flash")  # type: ignore[arg-type]  # what is tested
    with pytest.raises(
        ValueError, match="'cudnn' is for a GPU, this runs on a CPU: choose auto or"
    ):
        on("cudnn")
    for platform in ("cpu", "gpu"):
        with pytest.raises(ValueError, match=f"is for a TPU, this runs on a {platform.upper()}"):
            Runtime(make_mesh(), platform, "splash")
    with pytest.raises(ValueError, match="multiples of 128, found 40 positions and heads of 128"):
        run("splash", qkv(t=40))


def test_blocks_of_queries_come_one_after_the_other() -> None:
    """300 queries on a CPU are three blocks of 100, 301 three of 101 with padding."""
    for t in (300, 301):
        q, k, v = qkv(t, h=16)
        lengths = jnp.array([t, 77])
        found = jax.jit(
            lambda q, k, v, n: attention(
                q, k, v, is_causal=False, key_lengths=n, precision=FP32, runtime=on("xla")
            )
        )(q, k, v, lengths)
        logits = jnp.einsum("btkgh,bskh->bkgts", q.reshape(2, t, 2, 2, 16), k) / 4
        seen = jnp.arange(t) < lengths[:, None, None, None, None]
        weights = jax.nn.softmax(jnp.where(seen, logits, -jnp.inf), axis=-1)
        dense = jnp.einsum("bkgts,bskh->btkgh", weights, v).reshape(q.shape)
        np.testing.assert_allclose(found, dense, atol=3e-6)


def test_logits_of_a_long_row_are_never_all_there() -> None:
    """7200 patches with 16 heads: 3.3 GB of them."""
    shape = jax.ShapeDtypeStruct((1, 7200, 16, 64), jnp.float32)
    lengths = jax.ShapeDtypeStruct((1,), jnp.int32)
    compiled = (
        jax.jit(
            lambda q, n: attention(
                q, q, q, is_causal=False, key_lengths=n, precision=FP32, runtime=on("xla")
            )
        )
        .lower(shape, lengths)
        .compile()
    )
    assert compiled.memory_analysis().temp_size_in_bytes < 0.3e9
