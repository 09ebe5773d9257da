"""A hash that tells models apart by what they hold, wherever they lie."""

import hashlib
from pathlib import Path

from e5v_jax.checkpoints.converted import is_converted
from e5v_jax.checksums import CHECKSUMS
from e5v_jax.storage import size_and_time, walk_files

_LARGE = 64 * 2**20  # bytes; larger files are known by size and time, as reading them takes minutes
_NO_WEIGHTS = ("metrics.jsonl", "tensorboard")  # of a run folder: change without the model


def model_key(folder: Path, adapter: Path | None) -> str:
    """The hash of a model: of a converted folder its content hash, else of its files.

    A file of more than 64 MB counts by name, size and time of change.
    """
    digest = hashlib.sha256()
    for root in filter(None, (folder, adapter)):
        converted = root.is_dir() and is_converted(root)  # its config.json has the weights' hash
        for path in [root] if root.is_file() else walk_files(root):
            name = path.relative_to(root)
            skipped = ("params", "unused.safetensors", CHECKSUMS) if converted else _NO_WEIGHTS
            if name.parts and name.parts[0] in skipped:
                continue
            size, written = size_and_time(path)
            digest.update(f"{name} {size} ".encode())
            digest.update(written.encode() if size > _LARGE else path.read_bytes())
    return digest.hexdigest()
