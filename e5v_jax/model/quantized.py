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
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from qwix import QArray

Quantization = Literal["nf4", "int8"]
"""nf4: 4-bit NormalFloat, a scale per 64 inputs of each output. int8: a scale per output."""

NF4_TILE = 64
DEQUANTIZED = "dequantized_kernel"
"""What a backward pass must never keep: it would be the whole model in full precision."""


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


def dense_kernel(kernel: jax.Array | QArray, dtype: DTypeLike) -> jax.Array:
    """The kernel [in, out] in ``dtype``, dequantised if need be."""
    if not isinstance(kernel, QArray):
        return kernel.astype(dtype)
    dense = qwix.dequantize(kernel).astype(dtype)  # code x scale in fp32, then the cast
    return checkpoint_name(dense, DEQUANTIZED)


@partial(jax.jit, static_argnums=1)
def quantize_with_error(
    kernel: jax.Array, quantization: Quantization
) -> tuple[QArray, jax.Array, jax.Array]:
    """:func:`quantize_kernel`, and the sums of squares of its error and of the kernel (fp32)."""
    kernel = kernel.astype(jnp.float32)
    quantized = quantize_kernel(kernel, quantization)
    error = jnp.sum(jnp.square(qwix.dequantize(quantized) - kernel))
    return quantized, error, jnp.sum(jnp.square(kernel))
