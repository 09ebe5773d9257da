"""Embeddings kept on disk by (model, prompt, input): the same data is never embedded twice.

    DIR/<hash of model and prompt>/about.json      what the hash stands for
    DIR/<hash of model and prompt>/<hash>.npz      keys uint8 [n, 32], vectors float32 [n, D]

A shard appears only when whole, so an evaluation that was killed goes on where it stopped, and
several may share a folder.
"""

import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from e5v_jax.atomic import write_whole


def input_key(item: object) -> bytes:
    """Return 32 bytes that stand for an input of ``E5V.encode``: for its text and image's bytes."""
    if not isinstance(item, Mapping):
        item = {"text" if isinstance(item, str) else "image": item}
    digest = hashlib.sha256()
    for name, value in sorted(item.items()):
        if isinstance(value, Image.Image):
            content = f"{value.mode} {value.size}".encode() + value.tobytes()
        elif name == "text":
            content = str(value).encode("utf-8", "surrogatepass")
        else:
            content = value if isinstance(value, bytes) else Path(value).read_bytes()
        digest.update(f"{name} {len(content)} ".encode() + content)
    return digest.digest()


class VectorCache:
    """This holds the vectors of one model with one prompt."""

    def __init__(self, folder: Path, about: Mapping[str, str | None]) -> None:
        """Read what is there into ``vectors``, float32 [D] by :func:`input_key`.

        ``about`` names model and prompt, and all else a vector depends on. A damaged shard is left
        out and said so: its inputs are embedded again.

        Raises:
            OSError: the folder cannot be made or read.
        """
        text = (json.dumps(dict(about), indent=1, sort_keys=True) + "\n").encode()
        self._folder = folder / hashlib.sha256(text).hexdigest()[:32]
        self._folder.mkdir(parents=True, exist_ok=True)
        write_whole(self._folder / "about.json", lambda file: file.write(text))
        self.vectors: dict[bytes, np.ndarray] = {}
        for path in sorted(self._folder.glob("*.npz")):
            try:
                with np.load(path, allow_pickle=False) as shard:
                    keys, vectors = shard["keys"], shard["vectors"]
                    self.vectors.update(zip(map(bytes, keys), vectors, strict=True))
            except Exception as error:  # zipfile, zlib and NumPy raise many types
                print(f"{path}: damaged, left out ({error}); delete it", file=sys.stderr)

    def write(self, keys: list[bytes], vectors: np.ndarray) -> None:
        """Keep vectors [n, D] on disk, as one shard.

        Raises:
            OSError: the disk is full or the like; nothing half-written stays.
        """
        joined = b"".join(keys)
        stacked = np.frombuffer(joined, np.uint8).reshape(len(keys), -1)
        whole = vectors.astype(np.float32)
        path = self._folder / f"{hashlib.sha256(joined).hexdigest()[:32]}.npz"
        write_whole(path, lambda file: np.savez(file, keys=stacked, vectors=whole))
