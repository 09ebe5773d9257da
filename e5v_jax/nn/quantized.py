"""A linear map's kernel as NF4 or int8 codes with fp32 scales (qwix's core), and its matmul.

NF4 and ``int8_weight_only`` are storage: a kernel is dequantised where it is used, layer by layer
inside the decoder's scan, and the matmul runs in the compute dtype. That is QLoRA's arithmetic
(Dettmers et al. 2023, arXiv 2305.14314), without its second quantisation of the scales. ``int8``
multiplies codes: the activations are rounded, too, with a scale per token (LLM.int8's vector-wise
quantisation, arXiv 2208.07339, section 2.1), which is twice as fast where a chip has int8 units. So
that no outlier sets the scale of all, inputs are rotated first, 128 channels at a time, and the
kernel with them: nothing else changes (QuaRot, arXiv 2404.00456, section 3).
"""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import qwix
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from qwix import QArray

from e5v_jax.nn.nf4_tiles import NF4_TILE, dequantise_in_tiles, nf4_values

Quantization = Literal["nf4", "int8", "int8_weight_only"]
"""nf4: 4-bit NormalFloat, a scale per 64 inputs of each output. int8: a scale per output, and one
per token of what is multiplied with it, both rotated. int8_weight_only: storage alone."""
_BLOCK = 128  # channels that are rotated together: as many as TPUs multiply at a time


def rotate(x: jax.Array, precision: jax.lax.Precision) -> jax.Array:
    """Rotate the last axis [..., in] by a Hadamard matrix, block by block; in the dtype of ``x``.

    Blocks have 128 channels, or the largest power of two that divides ``in``. An outlier becomes as
    many values of its size over the square root of that. The matrix is its own inverse.
    """
    width = x.shape[-1]
    size = min(_BLOCK, width & -width)
    signs = np.ones((1, 1), np.float32)
    while len(signs) < size:
        signs = np.block([[signs, signs], [signs, -signs]])  # Sylvester's construction
    blocks = x.reshape(*x.shape[:-1], -1, size)  # [..., in / size, size]
    sums = jnp.matmul(
        blocks, signs.astype(x.dtype), precision=precision, preferred_element_type=jnp.float32
    )
    return (sums * size**-0.5).astype(x.dtype).reshape(x.shape)  # scaled in fp32, then cast


def quantize_kernel(kernel: jax.Array, quantization: Quantization) -> QArray:
    """Kernel [in, out] -> codes uint4 or int8 [in, out] with fp32 scales [in / 64 or 1, out].

    That of ``int8`` is for inputs that :func:`rotate` has rotated. Raises ValueError: nf4, and
    ``in`` is no multiple of 64.
    """
    kernel = _stored_kernel(kernel, quantization)
    if quantization != "nf4":
        return qwix.quantize(kernel, jnp.int8, channelwise_axes=(1,))
    if kernel.shape[0] % NF4_TILE:
        raise ValueError(
            f"nf4 needs kernels with a multiple of {NF4_TILE} inputs, this one has "
            f"{kernel.shape[0]}: use int8"
        )
    return qwix.quantize(kernel, "nf4", tiled_axes={0: NF4_TILE}, channelwise_axes=(1,))


def _stored_kernel(kernel: jax.Array, quantization: Quantization) -> jax.Array:
    """What is rounded of a kernel [in, out]: fp32, rotated as its inputs are."""
    kernel = kernel.astype(jnp.float32)  # scales and rounding in fp32
    if quantization != "int8":
        return kernel
    return rotate(kernel.T, jax.lax.Precision.HIGHEST).T


def dense_kernel(kernel: QArray, dtype: DTypeLike, *, in_tiles: bool = False) -> jax.Array:
    """The kernel [in, out] in ``dtype``, as it was stored; the bits are ``qwix.dequantize``'s.

    ``in_tiles`` dequantises NF4 by :func:`dequantise_in_tiles`, on one TPU chip.
    """
    if kernel.qtype != "nf4":
        return qwix.dequantize(kernel).astype(dtype)  # code x scale in fp32, then the cast
    if in_tiles:
        return dequantise_in_tiles(kernel.qvalue, kernel.scale, dtype)
    shape = kernel.qvalue.shape
    tiled = nf4_values(kernel.qvalue).reshape(-1, NF4_TILE, shape[1])  # [in / 64, 64, out]
    return (tiled * kernel.scale[:, None]).reshape(shape).astype(dtype)  # in fp32, then cast


def gather_kernel(kernel: QArray, gathered: NamedSharding | None) -> QArray:
    """Codes and scales as ``gathered`` has a kernel; None leaves them to XLA.

    Left alone XLA dequantises first, and moves 2 bytes or more for each weight instead of the 0.56
    that NF4 stores.
    """
    if gathered is None:
        return kernel

    def place(x: jax.Array) -> jax.Array:
        axes = (axis if n > 1 else None for axis, n in zip(gathered.spec, x.shape, strict=True))
        return jax.lax.with_sharding_constraint(x, NamedSharding(gathered.mesh, P(*axes)))

    placed: QArray = jax.tree.map(place, kernel)
    return placed


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def quantized_matmul(
    x: jax.Array,
    kernel: QArray,
    round_rows: bool,
    precision: jax.lax.Precision,
    in_tiles: bool = False,
    gathered: NamedSharding | None = None,
) -> jax.Array:
    """[N, in] times a frozen quantised kernel: [N, out] in the dtype of ``x``.

    With ``round_rows`` each row of ``x`` becomes int8, as the kernel must be; the gradient is that
    of no rounding (the straight-through estimator, Bengio et al. 2013, arXiv 1308.3432).
    ``in_tiles`` is as in :func:`dense_kernel`, ``gathered`` as in :func:`gather_kernel`.

    The backward pass gathers and dequantises again. What JAX would keep instead, each layer's dense
    kernel, is the whole model in full precision.
    """
    kernel = gather_kernel(kernel, gathered)
    if round_rows:
        return _int8_matmul(x, kernel)
    dense = dense_kernel(kernel, x.dtype, in_tiles=in_tiles)
    return jnp.matmul(x, dense, precision=precision)


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
    x: jax.Array,
    kernel: QArray,
    round_rows: bool,
    precision: jax.lax.Precision,
    in_tiles: bool,
    gathered: NamedSharding | None,
) -> tuple[jax.Array, QArray]:
    return quantized_matmul(x, kernel, round_rows, precision, in_tiles, gathered), kernel


def _backward(
    round_rows: bool,
    precision: jax.lax.Precision,
    in_tiles: bool,
    gathered: NamedSharding | None,
    kernel: QArray,
    gradient: jax.Array,
) -> tuple[jax.Array, None]:
    kernel = gather_kernel(kernel, gathered)
    dense = dense_kernel(kernel, gradient.dtype, in_tiles=in_tiles)
    return jnp.matmul(gradient, dense.T, precision=precision), None  # the kernel is frozen


quantized_matmul.defvjp(_forward, _backward)


@partial(jax.jit, static_argnums=1)
def quantize_with_error(
    kernel: jax.Array, quantization: Quantization
) -> tuple[QArray, jax.Array, jax.Array]:
    """:func:`quantize_kernel`, and the sums of squares of its error and of the kernel (fp32)."""
    quantized = quantize_kernel(kernel, quantization)
    kernel = _stored_kernel(kernel, quantization)
    error = jnp.sum(jnp.square(qwix.dequantize(quantized) - kernel))
    return quantized, error, jnp.sum(jnp.square(kernel))
