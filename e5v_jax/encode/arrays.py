"""Prepared inputs as the arrays of one device batch."""

from collections.abc import Sequence

import numpy as np

from e5v_jax.data.text import pad_right
from e5v_jax.encode.inputs import Prepared
from e5v_jax.model.llava_next import ImageBatch, TextBatch


def stack(
    items: Sequence[Prepared], length: int, *, num_tiles: int, pad_id: int
) -> TextBatch | ImageBatch:
    """Pad every item to ``length`` positions and, with ``num_tiles``, to as many tiles."""
    input_ids, last_index = pad_right([item.ids for item in items], length, pad_id)
    if not num_tiles:
        return TextBatch(input_ids, last_index)
    image_index, tiles = pack_images(items, length, num_tiles)
    input_ids = np.where(image_index >= 0, 0, input_ids)  # `<image>` may have no row
    return ImageBatch(input_ids, last_index, image_index, tiles)


def pack_images(
    items: Sequence[Prepared], length: int, num_tiles: int
) -> tuple[np.ndarray, np.ndarray]:
    """Tiles of a batch, ``num_tiles`` (K) for each item, and each token's feature among them.

    Returns:
        ``image_index`` int32 [B, length] and ``tiles`` uint8 [B*K, S, S, 3] (see ImageBatch).
    """
    sizes = [item.tiles.shape[1:] for item in items if item.tiles is not None]
    tiles = np.zeros((len(items), num_tiles, *sizes[0]), np.uint8)
    image_index = np.full((len(items), length), -1, np.int32)
    for row, item in enumerate(items):
        assert item.image_index is not None and item.tiles is not None
        tiles[row, : len(item.tiles)] = item.tiles
        newline = len(item.tiles) * item.patches  # its own; of the batch, it is behind all tiles
        index = item.image_index
        image_index[row, : len(index)] = np.where(index == newline, num_tiles * item.patches, index)
    return image_index, tiles.reshape(-1, *tiles.shape[2:])
