"""Positions on three axes (time, row, column) of a sequence with an image in it: M-RoPE's input."""

import numpy as np
from numpy.typing import NDArray

from e5v_jax.data.images import Size


def position_ids(length: int, start: int, grid: Size) -> NDArray[np.int32]:
    """Positions [length, 3] of a sequence whose image begins at token ``start``.

    ``grid`` is the image in tokens (rows, columns). Text counts up on all axes alike; an image's
    tokens share their time and have their row and column from there on; the text after it goes on
    behind the longer side (reference: transformers' ``get_rope_index``).
    """
    rows, columns = grid
    end = start + rows * columns
    found = np.empty((length, 3), np.int32)
    found[:start] = np.arange(start)[:, None]
    found[start:end, 0] = start
    found[start:end, 1] = start + np.repeat(np.arange(rows), columns)
    found[start:end, 2] = start + np.tile(np.arange(columns), rows)
    found[end:] = start + max(grid) + np.arange(length - end)[:, None]
    return found
