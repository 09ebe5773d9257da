"""Embeddings kept on disk by (model, prompt, input): the same data is never embedded twice.

    DIR/<hash of model and prompt>/about.json      what the hash stands for
    DIR/<hash of model and prompt>/<hash>.npz      keys uint8 [n, 32], vectors float32 [n, D]

A shard appears only when whole, so an evaluation that was killed goes on where it stopped, and
several may share a folder.
"""

import hashlib
import json
import os
import sys
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from e5v_jax.storage import size_and_time, walk_files

_LARGE = 64 * 2**20  # bytes; larger files are known by size and time, as reading them takes minutes
_NO_WEIGHTS = ("metrics.jsonl", "tensorboard")  # of a run folder: change without the model


def input_key(item: object) -> bytes:
    """32 bytes that stand for one input of ``E5V.encode``: its text and the bytes of its image."""
    parts = (
        item if isinstance(item, Mapping) else {"text" if isinstance(item, str) else "image": item}
    )
    digest = hashlib.sha256()
    for name, value in sorted(parts.items()):
        if isinstance(value, Image.Image):
            content = f"{value.mode} {value.size}".encode() + value.tobytes()
        elif name == "text":
            content = str(value).encode("utf-8", "surrogatepass")
        else:
            content = value if isinstance(value, bytes) else Path(value).read_bytes()
        digest.update(f"{name} {len(content)} ".encode() + content)
    return digest.digest()


def model_key(folder: Path, adapter: Path | None) -> str:
    """Hash of a model: of a converted folder its content hash, else of its files.

    A file of more than 64 MB counts by name, size and time of change.
    """
    from e5v_jax.checkpoints.converted import is_converted  # loads JAX

    digest = hashlib.sha256()
    for root in filter(None, (folder, adapter)):
        converted = root.is_dir() and is_converted(root)  # its config.json has the weights' hash
        for path in [root] if root.is_file() else walk_files(root):
            name = path.relative_to(root)
            skipped = ("params", "unused.safetensors") if converted else _NO_WEIGHTS
            if name.parts and name.parts[0] in skipped:
                continue
            size, written = size_and_time(path)
            digest.update(f"{name} {size} ".encode())
            if size > _LARGE:
                digest.update(written.encode())
            else:
                digest.update(path.read_bytes())
    return digest.hexdigest()


class VectorCache:
    """The vectors of one model with one prompt."""

    def __init__(self, folder: Path, about: Mapping[str, str]) -> None:
        """Read what is there; ``about`` names model and prompt, and all else a vector depends on.

        A damaged shard is left out and said so: its inputs are embedded again.

        Raises:
            OSError: the folder cannot be made or read.
        """
        text = json.dumps(dict(about), indent=1, sort_keys=True) + "\n"
        self._folder = folder / hashlib.sha256(text.encode()).hexdigest()[:32]
        self._folder.mkdir(parents=True, exist_ok=True)
        self._write("about.json", text.encode())
        self._vectors: dict[bytes, np.ndarray] = {}
        for path in sorted(self._folder.glob("*.npz")):
            try:
                with np.load(path, allow_pickle=False) as shard:
                    keys, vectors = shard["keys"], shard["vectors"]
                    self._vectors.update(zip(map(bytes, keys), vectors, strict=True))
            except Exception as error:  # zipfile, zlib and NumPy raise many types
                print(f"{path}: damaged, left out ({error}); delete it", file=sys.stderr)

    def get(self, key: bytes) -> np.ndarray | None:
        """The vector [D] of an input, None if it was not embedded yet."""
        return self._vectors.get(key)

    def add(self, keys: list[bytes], vectors: np.ndarray) -> None:
        """Keep vectors [n, D], in memory and as one shard."""
        buffer = BytesIO()
        np.savez(
            buffer,
            keys=np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), -1),
            vectors=vectors.astype(np.float32),
        )
        name = hashlib.sha256(b"".join(keys)).hexdigest()[:32]
        self._write(f"{name}.npz", buffer.getvalue())
        self._vectors.update(zip(keys, vectors, strict=True))

    def _write(self, name: str, content: bytes) -> None:
        temporary = self._folder / f".{name}.{os.getpid()}.tmp"
        try:
            temporary.write_bytes(content)
            temporary.rename(self._folder / name)
        finally:
            temporary.unlink(missing_ok=True)
