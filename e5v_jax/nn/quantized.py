"""A linear map's kernel as NF4 or int8 codes with fp32 scales (qwix's core), and its matmul.

NF4 and ``int8_weight_only`` are storage: a kernel is dequantised where it is used, layer by layer
inside the decoder's scan, and the matmul runs in the compute dtype. That is QLoRA's arithmetic
(Dettmers et al. 2023, arXiv 2305.14314), without its second quantisation of the scales. ``int8``
multiplies codes: the activations are rounded, too, with a scale per token (LLM.int8's vector-wise
quantisation, arXiv 2208.07339, section 2.1), which is twice as fast where a chip has int8 units.
"""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import qwix
from jax.typing import DTypeLike
from qwix import QArray

Quantization = Literal["nf4", "int8", "int8_weight_only"]
"""nf4: 4-bit NormalFloat, a scale per 64 inputs of each output. int8: a scale per output, and one
per token of what is multiplied with it. int8_weight_only: stored as int8 has it, no more."""

NF4_TILE = 64
_NF4_TABLE = """
-1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453
-0.28444138169288635 -0.18477343022823334 -0.09105003625154495 0.0
0.07958029955625534 0.16093020141124725 0.24611230194568634 0.33791524171829224
0.44070982933044434 0.5626170039176941 0.7229568362236023 1.0
"""
NF4_VALUES = tuple(map(float, _NF4_TABLE.split()))  # of the codes 0 to 15 (QLoRA, appendix E)


def quantize_kernel(kernel: jax.Array, quantization: Quantization) -> QArray:
    """Kernel [in, out] -> codes uint4 or int8 [in, out] with fp32 scales [in / 64 or 1, out].

    Raises ValueError: nf4, and ``in`` is no multiple of 64.
    """
    kernel = kernel.astype(jnp.float32)  # scales and rounding in fp32
    if quantization != "nf4":
        return qwix.quantize(kernel, jnp.int8, channelwise_axes=(1,))
    if kernel.shape[0] % NF4_TILE:
        raise ValueError(
            f"nf4 needs kernels with a multiple of {NF4_TILE} inputs, this one has "
            f"{kernel.shape[0]}: use int8"
        )
    return qwix.quantize(kernel, "nf4", tiled_axes={0: NF4_TILE}, channelwise_axes=(1,))


def dense_kernel(kernel: QArray, dtype: DTypeLike) -> jax.Array:
    """The kernel [in, out] in ``dtype``; the bits are those of ``qwix.dequantize``."""
    if kernel.qtype != "nf4":
        return qwix.dequantize(kernel).astype(dtype)  # code x scale in fp32, then the cast
    # qwix looks each code up in a table of the flattened kernel: on a TPU a gather per weight, in
    # fp32 through main memory, and on several devices the whole kernel on each. Selects fuse into
    # what reads them, and stay split.
    bits = kernel.qvalue.astype(jnp.int32)  # [in, out]
    values = [jnp.float32(value) for value in NF4_VALUES]
    for bit in range(4):
        is_set = ((bits >> bit) & 1) == 1
        values = [
            jnp.where(is_set, high, low)
            for low, high in zip(values[::2], values[1::2], strict=True)
        ]
    tiled = values[0].reshape(-1, NF4_TILE, bits.shape[1])  # [in / 64, 64, out]
    return (tiled * kernel.scale[:, None]).reshape(bits.shape).astype(dtype)  # in fp32, then cast


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def quantized_matmul(
    x: jax.Array, kernel: QArray, round_rows: bool, precision: jax.lax.Precision
) -> jax.Array:
    """[N, in] times a frozen quantised kernel: [N, out] in the dtype of ``x``.

    With ``round_rows`` each row of ``x`` becomes int8, as the kernel must be; the gradient is that
    of no rounding (the straight-through estimator, Bengio et al. 2013, arXiv 1308.3432).

    The backward pass dequantises again. What JAX would keep instead, each layer's dense kernel, is
    the whole model in full precision.
    """
    if round_rows:
        return _int8_matmul(x, kernel)
    return jnp.matmul(x, dense_kernel(kernel, x.dtype), precision=precision)


def _int8_matmul(x: jax.Array, kernel: QArray) -> jax.Array:
    """Round each row of [N, in] to int8, multiply codes, scale the sums: [N, out]."""
    rows = x.astype(jnp.float32)  # scales and rounding in fp32
    # a row of zeros has codes of zero with any scale
    scale = jnp.maximum(jnp.max(jnp.abs(rows), axis=1, keepdims=True) / 127, 1e-30)  # [N, 1]
    codes = jnp.round(rows / scale).astype(jnp.int8)
    sums = jax.lax.platform_dependent(codes, kernel.qvalue, cpu=_dot_on_cpu, default=_dot)
    return (sums * scale * kernel.scale).astype(x.dtype)


def _dot(codes: jax.Array, kernel: jax.Array) -> jax.Array:
    """int8 [N, in] times int8 [in, out], summed in int32, as fp32 [N, out]."""
    sums = jnp.matmul(codes, kernel, preferred_element_type=jnp.int32)
    return sums.astype(jnp.float32)


def _dot_on_cpu(codes: jax.Array, kernel: jax.Array) -> jax.Array:
    """:func:`_dot` in fp32, whose sums round from 2**24 on: XLA has no fast int8 matmul on CPUs."""
    exact = jax.lax.Precision.HIGHEST
    return jnp.matmul(codes.astype(jnp.float32), kernel.astype(jnp.float32), precision=exact)


def _forward(
    x: jax.Array, kernel: QArray, round_rows: bool, precision: jax.lax.Precision
) -> tuple[jax.Array, QArray]:
    return quantized_matmul(x, kernel, round_rows, precision), kernel


def _backward(
    round_rows: bool,
    precision: jax.lax.Precision,
    kernel: QArray,
    gradient: jax.Array,
) -> tuple[jax.Array, None]:
    dense = dense_kernel(kernel, gradient.dtype)
    return jnp.matmul(gradient, dense.T, precision=precision), None  # the kernel is frozen


quantized_matmul.defvjp(_forward, _backward)


@partial(jax.jit, static_argnums=1)
def quantize_with_error(
    kernel: jax.Array, quantization: Quantization
) -> tuple[QArray, jax.Array, jax.Array]:
    """:func:`quantize_kernel`, and the sums of squares of its error and of the kernel (fp32)."""
    kernel = kernel.astype(jnp.float32)
    quantized = quantize_kernel(kernel, quantization)
    error = jnp.sum(jnp.square(qwix.dequantize(quantized) - kernel))
    return quantized, error, jnp.sum(jnp.square(kernel))
