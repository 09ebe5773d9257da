"""The leaves of the model: linear maps with optional LoRA, and normalisation.

Modules are plain pytrees of ``nnx.Variable``; a stack of layers is the same module with one more
leading axis on every array. Storage dtype is ``param_dtype``; arithmetic runs in ``dtype``.
"""

from dataclasses import dataclass, replace
from typing import Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from qwix import QArray

from e5v_jax.nn.quantized import Quantization, quantize_kernel, quantized_matmul, rotate
from e5v_jax.nn.remat import LOW_RANK
from e5v_jax.runtime import Runtime


class LoRAParam(nnx.Param):
    """A trainable low-rank factor, always float32."""


@dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adaptation of every decoder linear map (Hu et al. 2021, arXiv 2106.09685)."""

    rank: int
    alpha: float
    dropout: float = 0.0

    @property
    def scale(self) -> float:
        """Factor on ``x @ a @ b``, as in peft: alpha / rank."""
        return self.alpha / self.rank


@dataclass(frozen=True)
class Precision:
    """Dtypes of one model: ``param`` to store base weights, ``compute`` for arithmetic.

    With ``quantization`` the kernels of the decoder's linear maps are stored quantised instead; a
    tower's are where that makes it faster.
    """

    param: DTypeLike
    compute: DTypeLike
    quantization: Quantization | None = None

    @property
    def unquantized(self) -> Self:
        """The same, for a part of the model whose kernels stay as they are."""
        return replace(self, quantization=None)

    @property
    def of_tower(self) -> Self:
        """The same, for a tower: too small to be stored in fewer bits for memory alone."""
        return self if self.quantization == "int8" else self.unquantized

    @property
    def matmul(self) -> jax.lax.Precision:
        """fp32 compute means fp32: GPUs and TPUs would otherwise round operands to TF32 or bf16."""
        exact = jnp.dtype(self.compute) == jnp.float32
        return jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT


@dataclass(frozen=True)
class Build:
    """How a module is made: its dtypes, its devices, and the factors beside its linear maps."""

    precision: Precision
    runtime: Runtime
    lora: LoRAConfig | None = None


def dropout(x: jax.Array, rate: float, key: jax.Array) -> jax.Array:
    """Zero a fraction ``rate`` of the entries of [N, D] and rescale the rest; dtype kept.

    An entry's fate is a hash of key, row and column: the same on every mesh, and a few integer
    operations that XLA fuses into what reads it. JAX's own generator takes TPUs' compiler minutes.
    """
    first, second = jax.random.key_data(key)  # uint32 [], twice
    row = jax.lax.broadcasted_iota(jnp.uint32, (len(x), 1), 0)
    column = jax.lax.broadcasted_iota(jnp.uint32, (1, x.shape[1]), 1)
    row = _mix(_mix(row ^ first) ^ second)  # [N, 1]
    bits = _mix(row + column * jnp.uint32(0x9E3779B9))  # [N, D]; 2**32 over the golden ratio
    dropped = bits < jnp.uint32(round(rate * 2**32))
    return jnp.where(dropped, jnp.zeros_like(x), x / (1.0 - rate))


def _mix(x: jax.Array) -> jax.Array:
    """Hash uint32 to uint32, one to one: the last steps of MurmurHash3."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


class Linear(nnx.Module):
    """``y = x @ kernel (+ bias) (+ scale * dropout(x) @ lora_a @ lora_b)``; kernel is [in, out]."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        build: Build,
        *,
        rngs: nnx.Rngs,
        use_bias: bool = False,
        result: str = "linear",
        spec: P | None = None,
    ) -> None:
        """``result`` names what it gives, LoRA added, for what a backward pass keeps.

        ``spec`` is how the mesh splits the kernel, by its row: quantised, it is gathered over
        ``fsdp`` where it is used. None leaves that to XLA.
        """
        precision, lora = build.precision, build.lora
        init = jax.nn.initializers.normal(0.02)
        kernel = init(rngs.params(), (in_features, out_features), jnp.dtype(precision.param))
        if precision.quantization is not None:
            kernel = quantize_kernel(kernel, precision.quantization)
        self.kernel = nnx.Param(kernel)
        if use_bias:
            self.bias = nnx.Param(jnp.zeros((out_features,), precision.param))
        if lora is not None:
            # peft's initialisation: a is kaiming-uniform with a=sqrt(5), b is zero
            bound = in_features**-0.5
            a = jax.random.uniform(
                rngs.params(), (in_features, lora.rank), jnp.float32, -bound, bound
            )
            self.lora_a = LoRAParam(a)
            self.lora_b = LoRAParam(jnp.zeros((lora.rank, out_features), jnp.float32))
        self.use_bias, self.result = use_bias, result
        self.lora = lora
        self.precision = precision
        # XLA cannot split what Pallas does over several chips
        mesh = build.runtime.mesh
        self.in_tiles = build.runtime.platform == "tpu" and mesh.size == 1
        self.gathered = None
        if spec is not None and mesh.size > 1:
            whole = P(*(None if axis == "fsdp" else axis for axis in spec))
            self.gathered = NamedSharding(mesh, whole)

    def __call__(
        self, x: jax.Array, *, dropout_key: jax.Array | None = None, exact: bool = False
    ) -> jax.Array:
        """Map [..., in] to [..., out] in the compute dtype; a ``dropout_key`` turns dropout on.

        With ``exact`` no activation is rounded to int8.
        """
        dtype, precision = self.precision.compute, self.precision.matmul
        leading = x.shape[:-1]
        # 2-D operands: XLA's CPU backend runs a training step of them a quarter faster than 3-D
        x = x.reshape(-1, x.shape[-1]).astype(dtype)  # [N, in]
        kernel = self.kernel.get_value()  # [in, out]
        if isinstance(kernel, QArray):
            is_int8 = self.precision.quantization == "int8"
            rows, round_rows = rotate(x, precision) if is_int8 else x, is_int8 and not exact
            y = quantized_matmul(
                rows, kernel, round_rows, precision, self.in_tiles, self.gathered
            )  # [N, out]
        else:
            y = jnp.matmul(x, kernel.astype(dtype), precision=precision)  # [N, out]
        if self.use_bias:
            y = y + self.bias[...].astype(dtype)
        if self.lora is not None:
            if dropout_key is not None and self.lora.dropout > 0:
                x = dropout(x, self.lora.dropout, dropout_key)
            low = jnp.matmul(x, self.lora_a[...].astype(dtype), precision=precision)  # [N, r]
            low = checkpoint_name(low, LOW_RANK)
            delta = jnp.matmul(low, self.lora_b[...].astype(dtype), precision=precision)
            y = y + jnp.asarray(self.lora.scale, dtype) * delta
        return checkpoint_name(y, self.result).reshape(*leading, y.shape[-1])  # [..., out]


class RMSNorm(nnx.Module):
    """Root-mean-square norm in fp32, as transformers' ``LlamaRMSNorm``."""

    def __init__(self, features: int, *, eps: float, precision: Precision) -> None:
        self.scale = nnx.Param(jnp.ones((features,), precision.param))
        self.eps = eps
        self.precision = precision

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise the last axis; the result is in the compute dtype."""
        dtype = self.precision.compute
        x = x.astype(jnp.float32)  # a bf16 mean of squares loses small features
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
        return self.scale[...].astype(dtype) * x.astype(dtype)  # HF rounds before scaling


class LayerNorm(nnx.Module):
    """Layer norm with bias in fp32, as ``torch.nn.LayerNorm``."""

    def __init__(self, features: int, *, eps: float, precision: Precision) -> None:
        self.scale = nnx.Param(jnp.ones((features,), precision.param))
        self.bias = nnx.Param(jnp.zeros((features,), precision.param))
        self.eps = eps
        self.precision = precision

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise the last axis; the result is in the compute dtype."""
        x = x.astype(jnp.float32)
        centred = x - jnp.mean(x, axis=-1, keepdims=True)
        y = centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), -1, keepdims=True) + self.eps)
        y = y * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)
        return y.astype(self.precision.compute)


def l2_normalize(x: jax.Array) -> jax.Array:
    """Unit vectors along the last axis, fp32 (``torch.nn.functional.normalize``: eps 1e-12)."""
    x = x.astype(jnp.float32)
    norm = jnp.linalg.norm(x, axis=-1, keepdims=True)
    return x / jnp.maximum(norm, 1e-12)
