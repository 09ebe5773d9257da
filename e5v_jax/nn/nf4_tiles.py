"""NF4 kernels dequantised tile by tile in a TPU's on-chip memory, by Pallas.

XLA may broadcast the scales, in fp32, to the shape of the kernel in main memory, since no fusion of
it crosses tiles of 64 rows: 5.8 to 9.9 bytes move for a weight of one matmul, by compiled programs.
Here a tile of codes and its scales are read, and the dense tile is written: 2.6 bytes, and 2 to
read it again.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.typing import DTypeLike

NF4_TILE = 64
_NF4_TABLE = """
-1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453
-0.28444138169288635 -0.18477343022823334 -0.09105003625154495 0.0
0.07958029955625534 0.16093020141124725 0.24611230194568634 0.33791524171829224
0.44070982933044434 0.5626170039176941 0.7229568362236023 1.0
"""
NF4_VALUES = tuple(map(float, _NF4_TABLE.split()))  # of the codes 0 to 15 (QLoRA, appendix E)
KERNEL = "nf4_dequantise"
"""Its name in a program."""
_SIDE = 512  # of a tile, a multiple of NF4_TILE: its eight rows of scales are a tile of fp32


def nf4_values(codes: jax.Array) -> jax.Array:
    """Codes uint4 of any shape -> their values in fp32, by selects alone.

    A table would be a gather per weight on a TPU, in fp32 through main memory, and on several
    devices the whole kernel on each. Selects fuse into what reads them, and stay split.
    """
    bits = codes.astype(jnp.int32)
    values = [jnp.float32(value) for value in NF4_VALUES]
    for bit in range(4):
        is_set = ((bits >> bit) & 1) == 1
        values = [
            jnp.where(is_set, high, low)
            for low, high in zip(values[::2], values[1::2], strict=True)
        ]
    return values[0]


@partial(jax.jit, static_argnames=("dtype", "interpret"))
def dequantise_in_tiles(
    codes: jax.Array, scale: jax.Array, dtype: DTypeLike, *, interpret: bool = False
) -> jax.Array:
    """Codes uint4 [in, out], scales fp32 [in / 64, out] -> the kernel [in, out] in ``dtype``.

    The product is made in fp32, then cast. ``interpret`` runs it on any platform, slowly.
    """
    rows, columns = codes.shape

    def place(row: int, column: int) -> tuple[int, int]:
        return row, column

    return pl.pallas_call(
        _dequantise_tile,
        out_shape=jax.ShapeDtypeStruct(codes.shape, dtype),
        grid=(pl.cdiv(rows, _SIDE), pl.cdiv(columns, _SIDE)),
        in_specs=[
            pl.BlockSpec((_SIDE, _SIDE), place),
            pl.BlockSpec((_SIDE // NF4_TILE, _SIDE), place),
        ],
        out_specs=pl.BlockSpec((_SIDE, _SIDE), place),
        interpret=interpret,
        name=KERNEL,
    )(codes, scale)


def _dequantise_tile(codes: jax.Array, scale: jax.Array, out: jax.Array) -> None:
    """Fill ``out`` [_SIDE, _SIDE] from the same tile of the codes; all three are references."""
    values = nf4_values(codes[...])
    for tile in range(_SIDE // NF4_TILE):
        own = slice(tile * NF4_TILE, (tile + 1) * NF4_TILE)
        out[own] = (values[own] * scale[tile : tile + 1]).astype(out.dtype)
