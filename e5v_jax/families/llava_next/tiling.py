"""Images to uint8 tiles and their token order: LLaVA-NeXT's "anyres" tiling, NumPy and Pillow only.

Tiles stay uint8 on the host; the device rescales and normalises them (nn/vision_tower.py).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from e5v_jax.data.images import ImageError, Size
from e5v_jax.families.llava_next.shrinking import shrunk_size

NEWLINE = -1  # in image_token_index: the image_newline vector, not a tile feature


@dataclass(frozen=True, eq=False)
class TiledImage:
    """One image as the vision tower sees it."""

    tiles: NDArray[np.uint8]  # [T, S, S, 3]: the whole image, then the grid row by row
    original_size: Size  # pixels (height, width) before any resizing


def select_best_resolution(original_size: Size, grid_pinpoints: Sequence[Size]) -> Size:
    """The pinpoint (height, width) that keeps most of the image's pixels.

    Most pixels after shrinking the image into the pinpoint, never counting more than it has;
    among equals the smallest pinpoint, then the first (reference: transformers
    ``select_best_resolution``).

    Raises:
        ImageError: the image has no pixels.
        ValueError: there are no pinpoints.
    """
    height, width = original_size
    if height < 1 or width < 1:
        raise ImageError(f"an image of {width}x{height} pixels, an image needs at least one")
    if not grid_pinpoints:
        raise ValueError("image_grid_pinpoints is empty, expected at least one (height, width)")

    def merit(pinpoint: Size) -> tuple[int, int]:
        scale = min(pinpoint[1] / width, pinpoint[0] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, -pinpoint[0] * pinpoint[1]

    return max(grid_pinpoints, key=merit)  # max returns the first of equals


def tile_image(
    image: Image.Image, *, image_size: int, grid_pinpoints: Sequence[Size]
) -> TiledImage:
    """Cut an RGB image into square tiles for the vision tower.

    Tile 0 is the whole image resized to the tile, its aspect ignored. The others are cut row by
    row from the image resized into the best pinpoint with its aspect kept and centred on black.
    Every resize starts from the original and is bicubic (reference: transformers
    ``LlavaNextImageProcessor``, equal to the last bit). ``image_size`` is the side S of a tile,
    ``grid_pinpoints`` are multiples of it, all in pixels; T = 1 + tiles of the best pinpoint.

    Raises:
        ImageError: the image has no pixels.
        ValueError: the image is not RGB, or a pinpoint is not a multiple of ``image_size``.
    """
    if image.mode != "RGB":
        raise ValueError(f"tile_image needs an RGB image, got {image.mode}; use load_image")
    _check_pinpoints(grid_pinpoints, image_size)
    original_size = (image.height, image.width)
    height, width = select_best_resolution(original_size, grid_pinpoints)
    new_height, new_width = _fit(original_size, (height, width))
    top, left = (height - new_height) // 2, (width - new_width) // 2

    canvas = np.zeros((height, width, 3), np.uint8)
    canvas[top : top + new_height, left : left + new_width] = _resize(image, new_height, new_width)
    s = image_size
    grid = canvas.reshape(height // s, s, width // s, s, 3)
    grid = grid.transpose(0, 2, 1, 3, 4).reshape(-1, s, s, 3)  # [T - 1, S, S, 3]
    return TiledImage(np.concatenate([_resize(image, s, s)[None], grid]), original_size)


def _fit(size: Size, box: Size) -> Size:
    """The largest (height, width) with the aspect of ``size`` inside ``box``, at least 1x1."""
    height, width = size
    scale_h, scale_w = box[0] / height, box[1] / width
    if scale_w < scale_h:
        return min(math.ceil(height * scale_w), box[0]), box[1]
    return box[0], min(math.ceil(width * scale_h), box[1])


def _resize(image: Image.Image, height: int, width: int) -> NDArray[np.uint8]:
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))  # [H, W, 3]


def image_token_index(
    original_size: Size, *, grid_pinpoints: Sequence[Size], image_size: int, patch_size: int
) -> NDArray[np.int32]:
    """Which vector each of an image's N tokens is: a row of the features [T * P, D], or NEWLINE.

    First the P tokens of tile 0, then the grid of tiles as one feature map, row by row without
    the rows and columns that only show padding, a newline after each row (reference:
    transformers ``LlavaNextModel.pack_image_features``). Of an extremely long image nothing but
    newlines, or nothing at all, may be left of the grid. Sizes are (height, width) or sides in
    pixels, the image's before any resizing; the result is int32 [N].

    Raises:
        ImageError: the image has no pixels.
        ValueError: a size is not a multiple of what it should be.
    """
    rows, columns, top, left = _feature_map(original_size, grid_pinpoints, image_size, patch_size)
    side = image_size // patch_size
    base = np.arange(side * side, dtype=np.int32)
    tiles = np.arange(side * side, side * side + rows * columns, dtype=np.int32)
    by_tile = tiles.reshape(-1, columns // side, side, side)  # [tile row, tile, row, column]
    grid = by_tile.transpose(0, 2, 1, 3).reshape(rows, columns)
    grid = grid[top : rows - top, left : columns - left]
    grid = np.pad(grid, ((0, 0), (0, 1)), constant_values=NEWLINE)
    return np.concatenate([base, grid.reshape(-1)])


def num_image_tokens(
    original_size: Size,
    *,
    grid_pinpoints: Sequence[Size],
    image_size: int,
    patch_size: int,
    max_tiles: int | None = None,
) -> int:
    """The length of :func:`image_token_index` without building it; same arguments and errors.

    With ``max_tiles`` that of the map as :func:`shrunk_size` makes it, which raises ImageError too.
    """
    size = feature_map_size(
        original_size, grid_pinpoints=grid_pinpoints, image_size=image_size, patch_size=patch_size
    )
    side = image_size // patch_size
    rows, columns = size if max_tiles is None else shrunk_size(size, side, max_tiles)
    return side**2 + rows * (columns + 1)


def feature_map_size(
    original_size: Size, *, grid_pinpoints: Sequence[Size], image_size: int, patch_size: int
) -> Size:
    """The (rows, columns) of the grid in :func:`image_token_index`; same arguments and errors."""
    rows, columns, top, left = _feature_map(original_size, grid_pinpoints, image_size, patch_size)
    return rows - 2 * top, columns - 2 * left


def _feature_map(
    original_size: Size, grid_pinpoints: Sequence[Size], image_size: int, patch_size: int
) -> tuple[int, int, int, int]:
    """The grid in patches: rows, columns, padding rows above (= below), columns left (= right)."""
    _check_pinpoints(grid_pinpoints, image_size)
    best = select_best_resolution(original_size, grid_pinpoints)
    height, width = original_size
    side = image_size // patch_size  # what is left over of a tile belongs to no patch
    rows, columns = (pixels // image_size * side for pixels in best)
    # In patches, with the reference's own rounding: it may differ from the pixels' by a row.
    if width / height > columns / rows:
        return rows, columns, (rows - int(round(height * (columns / width), 7))) // 2, 0
    return rows, columns, 0, (columns - int(round(width * (rows / height), 7))) // 2


def _check_pinpoints(grid_pinpoints: Sequence[Size], image_size: int) -> None:
    for height, width in grid_pinpoints:
        if height < 1 or width < 1 or height % image_size or width % image_size:
            raise ValueError(
                f"image_grid_pinpoints has ({height}, {width}), expected positive multiples of "
                f"image_size {image_size}"
            )
