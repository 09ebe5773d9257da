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


def quantize_kernel(kernel: jax.Array, quantization: Quantization) -> QArray:
    """Kernel [in, out] -> codes uint4 or int8 [in, out] with fp32 scales [in / 64 or 1, out].

    Raises:
        ValueError: nf4, and ``in`` is no multiple of 64.
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
    """The kernel [in, out] in ``dtype``."""
    return qwix.dequantize(kernel).astype(dtype)  # code x scale in fp32, then the cast


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
