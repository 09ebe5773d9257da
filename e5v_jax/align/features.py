"""What a frozen tower makes of images, computed once and kept on disk, a file for each image.

A small decoder's step is mostly the tower's work, which is the same in every epoch. The name of a
file follows from the tower (hash and configuration of the model, dtype) and from the image (its
bytes, what it is resized to first): a folder may serve many runs, and none reads another's.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.progress import track

from e5v_jax.align.config import AlignConfig
from e5v_jax.atomic import write_whole
from e5v_jax.checkpoints.converted import ConvertedFolder
from e5v_jax.families.base import Measured, Processor

_TILES = 16  # in the tower at a time


def open_features(cfg: AlignConfig, processor: Processor) -> "Features | None":
    """The features that ``cfg`` asks for. Raises ValueError: they are for one process."""
    if (folder := cfg.data.features) is None:
        return None
    if jax.process_count() > 1:
        raise ValueError("data.features: is for a run of one process; leave it out")
    return Features(folder, ConvertedFolder(cfg.model), cfg.dtype, processor)


class Features:
    """The features of some images, once they are :meth:`fill`-ed in."""

    def __init__(
        self, folder: Path, base: ConvertedFolder, dtype: str, processor: Processor
    ) -> None:
        """``base`` is the model of the run and ``dtype`` what its tower computes in."""
        config = {key: value for key, value in base.info.model.items() if key != "text"}
        of_tower = json.dumps([base.info.content_hash, config, dtype], sort_keys=True)
        self._folder = folder / hashlib.sha256(of_tower.encode()).hexdigest()[:16]
        self._dtype, self._processor = jnp.dtype(dtype), processor
        self._files: list[Path] = []  # by the position of the input

    def fill(self, model: Any, items: Sequence[Measured], pool: Executor) -> None:
        """Compute what is not on disk of ``items``, which are all inputs of a call, in its order.

        ``model`` has ``tile_features``. Raises OSError, ValueError: an image cannot be read.
        """
        self._files = list(pool.map(self._name, items))
        missing = [item for item in items if not self._files[item.position].is_file()]
        if not missing:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        graphdef, state = nnx.split(model)
        compute = jax.jit(lambda state, tiles: nnx.merge(graphdef, state).tile_features(tiles))
        for start in track(range(0, len(missing), _TILES), "features of images"):
            part = missing[start : start + _TILES]
            tiles = [loaded.tiles for loaded in pool.map(self._processor.load, part)]
            ends = np.cumsum([len(own) for own in tiles])
            # an image of a tile's size is cut into itself: the tower sees it once
            number: dict[bytes, int] = {}
            place = [number.setdefault(x.tobytes(), len(number)) for own in tiles for x in own]
            padded = np.zeros((-(-len(number) // _TILES) * _TILES, *tiles[0].shape[1:]), np.uint8)
            padded[place] = np.concatenate(tiles)  # whole batches: one shape to compile
            # NumPy writes no bfloat16; as fp32 each value is the same
            found = np.concatenate(
                [
                    np.asarray(compute(state, padded[i : i + _TILES])).astype(np.float32)
                    for i in range(0, len(padded), _TILES)
                ]
            )[place]  # [tiles of all, P, Dv]
            for item, own in zip(part, np.split(found, ends)[:-1], strict=True):
                write_whole(self._files[item.position], _saving(own))

    def arrays(self) -> Iterator[np.ndarray]:
        """Those of every input that was filled in, fp32 [tiles, P, Dv]."""
        return map(np.load, self._files)

    def load(self, item: Measured) -> Any:
        """As :attr:`e5v_jax.families.base.Processor.load`, but no image is decoded."""
        features = np.load(self._files[item.position]).astype(self._dtype)
        return self._processor.load(replace(item, features=features))

    def _name(self, item: Measured) -> Path:
        """Where the features of an image are."""
        image = item.image
        assert isinstance(image, Path | bytes) and item.image_size is not None
        digest = hashlib.sha256(image if isinstance(image, bytes) else image.read_bytes())
        digest.update(repr(self._processor.preset.first_size(item.image_size)).encode())
        return self._folder / f"{digest.hexdigest()}.npy"


def _saving(array: np.ndarray) -> Any:
    def save(file: BinaryIO) -> None:
        np.save(file, array)

    return save
