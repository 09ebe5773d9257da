"""Quantised storage of a linear map's kernel: NF4 or int8 codes with fp32 scales (qwix's core).

Only storage: a kernel is dequantised where it is used, layer by layer inside the decoder's scan,
and the matmul runs in the compute dtype. That is QLoRA's arithmetic (Dettmers et al. 2023,
arXiv 2305.14314), without its second quantisation of the scales.
"""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import qwix
from jax.typing import DTypeLike
from qwix import QArray

Quantization = Literal["nf4", "int8"]
"""nf4: 4-bit NormalFloat, a scale per 64 inputs of each output. int8: a scale per output."""

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
    if quantization == "int8":
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


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def quantized_matmul(x: jax.Array, kernel: QArray, precision: jax.lax.Precision) -> jax.Array:
    """[N, in] times a frozen quantised kernel: [N, out] in the dtype of ``x``.

    The backward pass dequantises again. What JAX would keep instead, each layer's dense kernel, is
    the whole model in full precision.
    """
    return jnp.matmul(x, dense_kernel(kernel, x.dtype), precision=precision)


def _forward(
    x: jax.Array, kernel: QArray, precision: jax.lax.Precision
) -> tuple[jax.Array, QArray]:
    return quantized_matmul(x, kernel, precision), kernel


def _backward(
    precision: jax.lax.Precision, kernel: QArray, gradient: jax.Array
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
