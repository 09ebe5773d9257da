"""Many inputs to vectors: a few at a time, each distinct one once, kept on disk if asked.

    DIR/<hash of model and prompt>/about.json      what the hash stands for
    DIR/<hash of model and prompt>/<hash>.npz      keys uint8 [n, 32], vectors float32 [n, D]

A shard appears only when whole: a killed evaluation can go on, and several may share a folder.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import track

from e5v_jax import __version__
from e5v_jax.atomic import write_whole
from e5v_jax.data.inputs import Input, InputError
from e5v_jax.evaluate.vectors import normalised, squared_lengths
from e5v_jax.presets import E5_V, ROLES, Role

if TYPE_CHECKING:
    from e5v_jax import E5V

_TEXTS, _IMAGES = 1024, 64  # inputs prepared at once: sorts lengths well; bounds decoded images
Item = TypeVar("Item")


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

        ``about`` names model, prompt and all else a vector depends on. A damaged shard is left out
        with a message: its inputs are embedded again. Raises OSError: no folder to make or read.
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
        """Keep vectors [n, D] as one shard, or nothing. Raises OSError: a full disk or the like."""
        joined = b"".join(keys)
        stacked = np.frombuffer(joined, np.uint8).reshape(len(keys), -1)
        whole = vectors.astype(np.float32)
        path = self._folder / f"{hashlib.sha256(joined).hexdigest()[:32]}.npz"
        write_whole(path, lambda file: np.savez(file, keys=stacked, vectors=whole))


class CachedEncoder:
    """This is how evaluations embed: :meth:`E5V.encode` with a cache and places in messages."""

    def __init__(
        self,
        model: "E5V",
        *,
        batch_size: int,
        cache: Path | None = None,
        about: Mapping[str, str | None] | None = None,
    ) -> None:
        """Wrap a model; with ``cache``, vectors are kept there, ``about`` tells models apart."""
        self._model, self._batch_size, self._cache = model, batch_size, cache
        self.template, self.preset = model.template, model.preset
        how = {"template": model.template, "preset": model.preset.name}
        self._about = {**(about or {}), **how, "e5v-jax": __version__}

    def prompt(self, paper: str, role: Role) -> str:
        """Give what :meth:`embed` takes: E5-V's is the paper's prompt, others' that of the role."""
        return paper if self.preset is E5_V else role

    def embed(
        self,
        items: Sequence[Item],
        *,
        prompt: str,
        make: Callable[[Item], Input],
        where: Callable[[int], str] | None = None,
        normalize: bool = True,
    ) -> np.ndarray:
        """Embed ``items`` and return their vectors, fp32 [N, D], in the same order.

        ``prompt`` has ``<sent>`` and/or ``<image>``, or is a role, whose prompts the preset has.
        ``make`` turns an item into an input of
        ``E5V.encode`` when its turn comes, so that only few images are in memory. ``where`` names
        the item at a position, for messages; by default the text or where the image lies. With
        ``normalize`` False nothing is rounded: a cosine may tie.
        Raises ValueError: a bad input, or a vector that is zero or not finite.
        """
        if where is None:
            names = [f"text {item!r}" if isinstance(item, str) else str(item) for item in items]
            where = names.__getitem__
        about = {**self._about, "prompt": prompt}
        cache = None if self._cache is None else VectorCache(self._cache, about)
        known: dict[bytes, np.ndarray] = {} if cache is None else cache.vectors
        keys: list[bytes] = []
        said: dict[str, Any] = {"prompt_name" if prompt in ROLES else "prompt": prompt}
        few = "<image>" in prompt or (prompt in ROLES and make is not str)
        chunk = _IMAGES if few else _TEXTS
        shown = sys.stderr.isatty() and len(items) > self._batch_size
        positions = range(len(items))
        starts, console = positions[::chunk], Console(stderr=True)
        for start in track(starts, "embedding", console=console, transient=True, disable=not shown):
            new: dict[bytes, Input] = {}
            places: list[str] = []
            for position in positions[start : start + chunk]:
                try:
                    made = make(items[position])
                    keys.append(input_key(made))
                except (OSError, ValueError) as error:
                    raise ValueError(f"{where(position)}: {error}") from error
                if keys[-1] not in known and keys[-1] not in new:
                    new[keys[-1]] = made
                    places.append(where(position))
            if not new:
                continue
            try:
                vectors = self._model.encode(
                    list(new.values()),
                    **said,
                    batch_size=self._batch_size,
                    normalize_embeddings=False,
                    show_progress_bar=False,
                )
            except InputError as error:
                raise ValueError(f"{places[error.position]}: {error.reason}") from error
            squared_lengths(vectors, places, what="inputs")
            known.update(zip(new, vectors, strict=True))
            if cache is not None:
                cache.write(list(new), vectors)
        found = np.stack([known[key] for key in keys])  # [N, D]
        return normalised(found) if normalize else found
