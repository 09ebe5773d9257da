"""Prepared items to vectors: length buckets, few compiled shapes, order restored."""

from collections.abc import Callable, Sequence

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from e5v_jax.data.text import bucket_length, pad_right
from e5v_jax.encode.inputs import Prepared
from e5v_jax.model.llava_next import ImageBatch, LlavaNext, TextBatch
from e5v_jax.sharding import batch_sharding

TEXT_BUCKETS = (16, 24, 32, 40, 48, 64, 96, 128, 192, 256, 384, 512, 1024, 2048, 4096, 8192)
IMAGE_BUCKETS = tuple(range(256, 8193, 256))
MAX_BATCH_TOKENS = 8192
"""Positions of one device batch; bounds the memory of the [T, T] attention logits too."""


class Encoder:
    """Holds the parameters and runs the jitted model over batches."""

    def __init__(self, model: LlavaNext, mesh: Mesh, *, pad_id: int) -> None:
        graphdef, self._state = nnx.split(model)
        self._mesh = mesh
        self._pad_id = pad_id
        self._rows = mesh.shape["data"] * mesh.shape["fsdp"]  # devices that share a batch

        def run(state: nnx.State, batch: TextBatch | ImageBatch) -> jax.Array:
            return nnx.merge(graphdef, state)(batch)

        self._run: Callable[[nnx.State, TextBatch | ImageBatch], jax.Array] = jax.jit(run)

    def encode(
        self,
        items: Sequence[Prepared],
        *,
        batch_size: int,
        on_batch: Callable[[int], None] = lambda done: None,
    ) -> np.ndarray:
        """Vectors fp32 [N, D], not normalised, in the order of ``items`` ([0, 0] for none).

        ``batch_size`` is the most items a device batch holds. ``on_batch`` hears how many items
        each finished batch had.
        """
        vectors: list[np.ndarray | None] = [None] * len(items)
        text = [i for i, item in enumerate(items) if item.tiles is None]
        image = [i for i, item in enumerate(items) if item.tiles is not None]
        for group, buckets in ((text, TEXT_BUCKETS), (image, IMAGE_BUCKETS)):
            # longest first: if the largest batch does not fit in memory, it fails at once
            group.sort(key=lambda i: -len(items[i].ids))
            while group:
                length = bucket_length(len(items[group[0]].ids), buckets)
                rows = self._batch_rows(length, batch_size)
                members, group = group[:rows], group[rows:]
                out = self._encode_batch([items[i] for i in members], length, rows)
                for row, i in enumerate(members):
                    vectors[i] = out[row]
                on_batch(len(members))
        return np.array(vectors, np.float32) if vectors else np.zeros((0, 0), np.float32)

    def _batch_rows(self, length: int, batch_size: int) -> int:
        rows = max(1, min(batch_size, MAX_BATCH_TOKENS // length))
        return -(-rows // self._rows) * self._rows  # a multiple of the devices that share a batch

    def _encode_batch(self, items: list[Prepared], length: int, rows: int) -> np.ndarray:
        """fp32 [rows, D]; short batches are filled by repeating the last item."""
        filled = items + [items[-1]] * (rows - len(items))
        input_ids, last_index = pad_right([item.ids for item in filled], length, self._pad_id)
        sharding = batch_sharding(self._mesh)
        if items[0].tiles is None:
            text = jax.device_put(TextBatch(input_ids, last_index), sharding)
            return np.asarray(self._run(self._state, text))
        image_index, tiles = pack_images(filled, length)
        input_ids = np.where(image_index >= 0, 0, input_ids)  # `<image>` may have no row
        tiles = jax.device_put(tiles, NamedSharding(self._mesh, PartitionSpec()))
        input_ids, last_index, image_index = jax.device_put(
            (input_ids, last_index, image_index), sharding
        )
        batch = ImageBatch(input_ids, last_index, image_index, tiles)
        return np.asarray(self._run(self._state, batch))


def pack_images(items: Sequence[Prepared], length: int) -> tuple[np.ndarray, np.ndarray]:
    """All tiles of a batch in one array and each token's row in it.

    Tile arrays are zero-padded to five tiles an image (LLaVA-NeXT's most), so shapes are few.

    Returns:
        ``image_index`` int32 [B, length] and ``tiles`` uint8 [T, S, S, 3] (see ImageBatch).
    """
    tiles_list = [item.tiles for item in items if item.tiles is not None]
    used = sum(len(tiles) for tiles in tiles_list)
    total = len(items) * max(5, max(len(tiles) for tiles in tiles_list))
    tiles = np.zeros((total, *tiles_list[0].shape[1:]), np.uint8)
    tiles[:used] = np.concatenate(tiles_list)
    image_index = np.full((len(items), length), -1, np.int32)
    start = 0
    for row, item in enumerate(items):
        assert item.image_index is not None and item.tiles is not None
        index, patches = item.image_index, item.patches
        newline = len(item.tiles) * patches  # its own, moved behind all tiles of the batch
        moved = np.where(index == newline, total * patches, index + start * patches)
        image_index[row, : len(index)] = np.where(index < 0, -1, moved)
        start += len(item.tiles)
    return image_index, tiles
