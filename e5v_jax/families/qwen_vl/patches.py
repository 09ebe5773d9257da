"""Images to uint8 patches in the order that the tower merges them, and their place in the grid."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from e5v_jax.data.images import Size


@dataclass(frozen=True, eq=False)
class PatchedImage:
    """One image as the tower sees it; patches of a block of merged ones stand together."""

    pixels: NDArray[np.uint8]  # [P, 3*p*p], each patch channel by channel
    place: NDArray[np.int16]  # [P, 2], row and column of each patch
    grid: Size  # patches (rows, columns)
    order: NDArray[np.int32]  # [tokens], which token of the grid each one of patches is


def cut_patches(
    image: Image.Image, size: Size, *, patch: int, merge: int, window: int = 0
) -> PatchedImage:
    """Resize an RGB image to ``size`` (height, width), bicubic as Pillow does it, and cut it.

    Patches come block by block of ``merge`` x ``merge``, so that as many in a row are one token
    (reference: ``Qwen2VLImageProcessorPil.patchify``). A still image is one frame here: that the
    reference repeats it over time is left to the kernel (vision.py). With a ``window`` the tokens
    come window by window, squares of that many tokens a side.
    """
    resized = np.asarray(image.resize(size[::-1], Image.Resampling.BICUBIC))  # [H, W, 3]
    rows, columns = size[0] // patch, size[1] // patch
    blocks = resized.reshape(rows // merge, merge, patch, columns // merge, merge, patch, 3)
    blocks = blocks.transpose(0, 3, 1, 4, 6, 2, 5)  # [block row, block column, row, column, ...]
    grid, tokens = (rows, columns), rows * columns // merge**2
    order = window_order((rows // merge, columns // merge), window or max(grid))
    pixels = blocks.reshape(tokens, -1)[order].reshape(rows * columns, 3 * patch * patch)
    place = patch_places(grid, merge).reshape(tokens, -1)[order].reshape(-1, 2)
    return PatchedImage(pixels, place, grid, order)


def window_order(grid: Size, side: int) -> NDArray[np.int32]:
    """The tokens of a grid (rows, columns of tokens) window by window, [rows * columns].

    Reference: transformers' ``get_vision_window_index``.
    """
    row, column = (axis.ravel() for axis in np.indices(grid))
    # the last key of lexsort counts most: windows by row and column, tokens in each likewise
    order = np.lexsort((column, row, column // side, row // side))
    return order.astype(np.int32)


def patch_places(grid: Size, merge: int) -> NDArray[np.int16]:
    """Row and column [P, 2] of each patch of a grid (rows, columns), in the order of patches."""
    rows, columns = grid
    place = np.indices(grid).transpose(1, 2, 0).astype(np.int16)  # [rows, columns, 2]
    blocks = place.reshape(rows // merge, merge, columns // merge, merge, 2)
    return blocks.transpose(0, 2, 1, 3, 4).reshape(-1, 2)
