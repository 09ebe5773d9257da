"""Feature maps that are too large, made smaller: LLaVA-OneVision's "anyres_max_N", NumPy only.

The reference resizes the map of an image on the device, to a size of its own for each. Here the
same bilinear resize is a sum of four features for each token, whose rows and weights the host
finds: the device gathers them, and its program does not depend on the image.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from e5v_jax.data.images import ImageError, Size

_TOLERATED = 1.1  # a map whose sides are this much too long is left as it is


class Blend(NamedTuple):
    """Tokens as sums of features: what is summed and how much of it."""

    features: NDArray[np.int32]  # [N, 4], as in image_token_index
    weights: NDArray[np.float32]  # [N, 4], 0 to 1, their sum is 1


def can_shrink(tiles: int, max_tiles: int) -> bool:
    """Whether the map of a grid of ``tiles`` may be too large; less than a tile is never cut."""
    return math.sqrt(tiles / max_tiles) > _TOLERATED


def shrunk_size(size: Size, side: int, max_tiles: int) -> Size:
    """What a map of ``size`` (rows, columns) is made, of at most ``max_tiles`` tiles or a bit more.

    ``side`` is that of a tile in patches (reference: transformers
    ``LlavaOnevisionModel.pack_image_features``, with its own rounding).

    Raises ImageError: nothing would be left, where the reference fails too.
    """
    rows, columns = size
    ratio = math.sqrt(rows * columns / (max_tiles * side**2))
    if ratio <= _TOLERATED:
        return size
    new = int(rows // ratio), int(columns // ratio)
    if not all(new):
        raise ImageError(
            f"an image of {columns}x{rows} patches, which this model makes {new[1]}x{new[0]}: it "
            "is too long, cut it into pieces"
        )
    return new


def shrink(tokens: NDArray[np.int32], size: Size, new: Size) -> Blend:
    """The tokens of an image whose map of ``size`` (rows, columns) is made ``new``.

    ``tokens`` are those of the map as it is, from ``image_token_index``: a tile's, then the rows
    of the map, a newline after each.
    """
    (rows, columns), start = size, len(tokens) - size[0] * (size[1] + 1)
    grid = tokens[start:].reshape(rows, columns + 1)
    top, below, down = _neighbours(rows, new[0])  # [h]
    left, right, along = _neighbours(columns, new[1])  # [w]
    corners = [grid[np.ix_(y, x)] for y in (top, below) for x in (left, right)]
    shares = [np.outer(y, x) for y in (1 - down, down) for x in (1 - along, along)]
    newline = np.broadcast_to(grid[:1, -1:, None], (new[0], 1, 4))
    index = np.concatenate([np.stack(corners, axis=-1), newline], axis=1)  # [h, w + 1, 4]
    weights = np.pad(np.stack(shares, axis=-1), ((0, 0), (0, 1), (0, 0)))  # [h, w + 1, 4]
    weights[:, -1, 0] = 1
    before = np.zeros((start, 4), np.float32)
    before[:, 0] = 1
    return Blend(
        np.concatenate([np.repeat(tokens[:start, None], 4, axis=1), index.reshape(-1, 4)]),
        np.concatenate([before, weights.reshape(-1, 4)]),
    )


def _neighbours(
    size: int, new: int
) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float32]]:
    """For each of ``new`` places the two of ``size`` around it and the share of the second.

    As ``torch.nn.functional.interpolate(mode="bilinear", align_corners=False)``, in float32 too.
    """
    step = np.float32(size) / np.float32(new)
    half = np.float32(0.5)
    place = np.maximum(step * (np.arange(new, dtype=np.float32) + half) - half, 0)
    first = np.minimum(place.astype(np.intp), size - 1)
    return first, np.minimum(first + 1, size - 1), place - first.astype(np.float32)
