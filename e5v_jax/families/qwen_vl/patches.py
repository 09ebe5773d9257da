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


def cut_patches(image: Image.Image, size: Size, *, patch: int, merge: int) -> PatchedImage:
    """Resize an RGB image to ``size`` (height, width), bicubic as Pillow does it, and cut it.

    Patches come block by block of ``merge`` x ``merge``, so that as many in a row are one token
    (reference: ``Qwen2VLImageProcessorPil.patchify``). A still image is one frame here: that the
    reference repeats it over time is left to the kernel (vision.py).
    """
    resized = np.asarray(image.resize(size[::-1], Image.Resampling.BICUBIC))  # [H, W, 3]
    rows, columns = size[0] // patch, size[1] // patch
    blocks = resized.reshape(rows // merge, merge, patch, columns // merge, merge, patch, 3)
    blocks = blocks.transpose(0, 3, 1, 4, 6, 2, 5)  # [block row, block column, row, column, ...]
    pixels = np.ascontiguousarray(blocks).reshape(rows * columns, 3 * patch * patch)
    return PatchedImage(pixels, patch_places((rows, columns), merge), (rows, columns))


def patch_places(grid: Size, merge: int) -> NDArray[np.int16]:
    """Row and column [P, 2] of each patch of a grid (rows, columns), in the order of patches."""
    rows, columns = grid
    place = np.indices(grid).transpose(1, 2, 0).astype(np.int16)  # [rows, columns, 2]
    blocks = place.reshape(rows // merge, merge, columns // merge, merge, 2)
    return blocks.transpose(0, 2, 1, 3, 4).reshape(-1, 2)
