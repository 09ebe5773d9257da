"""An index without a model: what tests of the search embed with, and folders to index."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from e5v_jax.data.images import load_image
from e5v_jax.data.inputs import Input, InputError, split_input
from e5v_jax.search.index import OnError
from e5v_jax.search.store import Store

DIMENSIONS = 24


def embed_one(item: Input) -> np.ndarray:
    """A unit vector [D] that depends on the text and the pixels, and on nothing else."""
    text, image = split_input(item)
    digest = hashlib.sha256((text or "").encode())
    if image is not None:
        digest.update(load_image(image).tobytes())
    seed = int.from_bytes(digest.digest()[:8])
    vector = np.random.default_rng(seed).standard_normal(DIMENSIONS)
    return (vector / np.linalg.norm(vector)).astype(np.float32)


def embed_all(inputs: Sequence[Input], on_error: OnError) -> np.ndarray:
    """Vectors [N, D]; a text with "unembeddable" in it has none."""
    vectors = np.zeros((len(inputs), DIMENSIONS), np.float32)
    for position, item in enumerate(inputs):
        if isinstance(item, str) and "unembeddable" in item:
            on_error(InputError(position, "the model gives no vector"))
        else:
            vectors[position] = embed_one(item)
    return vectors


def draw(path: Path, seed: int, size: tuple[int, int] = (60, 40), **options: object) -> Path:
    """Write a picture of random pixels (width, height), in the format of its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return path


def content_of(index: Path) -> list[tuple[object, ...]]:
    """All that can be found in an index, with its vectors; whatever the numbers inside are."""
    store = Store(index)
    with store.reading() as now:
        each = [pair for block in now.blocks(7) for pair in zip(*block, strict=True)]
        small = {row.id: now.thumbnail(row.id) for row, _ in each}
    store.close()
    return sorted(
        (row.path, row.line or 0, row.kind, row.text or "", vector.tobytes(), small[row.id] or b"")
        for row, vector in each
    )
