"""Many inputs to vectors: a few at a time, each distinct one once, through the cache if any."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from rich.console import Console
from rich.progress import Progress

from e5v_jax import __version__, cli
from e5v_jax.evaluate.cache import VectorCache, input_key, model_key

if TYPE_CHECKING:
    from e5v_jax import E5V
    from e5v_jax.embedder import Dtype
    from e5v_jax.encode.inputs import Input
    from e5v_jax.model.quantized import Quantization

_TEXTS, _IMAGES = 1024, 64  # inputs prepared at once: sorts lengths well; bounds decoded images
Item = TypeVar("Item")


class Embedder:
    """A model as evaluations use it."""

    def __init__(
        self,
        model: "E5V",
        *,
        batch_size: int,
        cache: Path | None = None,
        about: dict[str, str] | None = None,
    ) -> None:
        """With ``cache``, vectors are kept there; ``about`` then says which model this is."""
        self._model = model
        self._batch_size = batch_size
        self._cache = cache
        self._about = about or {}
        self._opened: dict[str, VectorCache] = {}

    def embed(
        self,
        items: Sequence[Item],
        *,
        prompt: str,
        make: "Callable[[Item], Input]",
        where: Callable[[int], str],
        normalize: bool = True,
    ) -> np.ndarray:
        """Vectors fp32 [N, D] of ``items``, order kept.

        Args:
            items: what is to be embedded, perhaps only named.
            prompt: instruction with ``<sent>`` and/or ``<image>``.
            make: turns one item into an input of ``E5V.encode``; called when its turn comes, so
                that only few images are in memory.
            where: where a person finds an item by its position, for messages.
            normalize: to unit length.

        Raises:
            ValueError: a bad input, or a vector that is zero or not finite.
        """
        from e5v_jax.encode.inputs import InputError

        cache = self._open(prompt)
        known: dict[bytes, np.ndarray] = {}  # of this call
        keys: list[bytes] = []
        chunk = _IMAGES if "<image>" in prompt else _TEXTS
        shown = sys.stderr.isatty() and len(items) > self._batch_size
        with Progress(console=Console(stderr=True), disable=not shown, transient=True) as progress:
            task = progress.add_task("embedding", total=len(items))
            for start in range(0, len(items), chunk):
                new: dict[bytes, Input] = {}
                positions = []
                for position in range(start, min(start + chunk, len(items))):
                    try:
                        made = make(items[position])
                        key = input_key(made)
                    except (OSError, ValueError) as error:
                        raise ValueError(f"{where(position)}: {error}") from error
                    keys.append(key)
                    if key in known or key in new:
                        continue
                    vector = None if cache is None else cache.get(key)
                    if vector is None:
                        new[key] = made
                        positions.append(position)
                    else:
                        known[key] = vector
                if new:
                    try:
                        vectors = self._model.encode(
                            list(new.values()),
                            prompt=prompt,
                            batch_size=self._batch_size,
                            normalize_embeddings=False,
                            show_progress_bar=False,
                        )
                    except InputError as error:
                        place = where(positions[error.position])
                        raise ValueError(f"{place}: {error.reason}") from error
                    _check(vectors, [where(position) for position in positions])
                    known.update(zip(new, vectors, strict=True))
                    if cache is not None:
                        cache.add(list(new), vectors)
                progress.advance(task, len(keys) - start)
        vectors = np.stack([known[key] for key in keys])  # [N, D]
        if normalize:
            vectors = normalised(vectors)
        return vectors

    @property
    def template(self) -> str:
        """Name of the model's chat template."""
        return self._model.template

    def _open(self, prompt: str) -> VectorCache | None:
        if self._cache is None:
            return None
        if prompt not in self._opened:
            about = {
                **self._about,
                "template": self._model.template,
                "prompt": prompt,
                "e5v-jax": __version__,
            }
            self._opened[prompt] = VectorCache(self._cache, about)
        return self._opened[prompt]


def open_embedder(
    model: str,
    *,
    dtype: "Dtype",
    adapter: Path | None,
    template: str | None,
    batch_size: int,
    cache: Path | None,
    quantize: "Quantization | None" = None,
    fsdp: int = 1,
    tensor: int = 1,
) -> Embedder:
    """Load a model to evaluate; arguments as the command's.

    Raises:
        cli.UsageError: an unknown template, or a mesh that the devices do not make.
        FileNotFoundError, ValueError: the model cannot be loaded.
    """
    from convert.hf_source import resolve
    from e5v_jax import E5V
    from e5v_jax.prompts import TEMPLATES
    from e5v_jax.sharding import make_mesh

    if template is not None and template not in TEMPLATES:
        raise cli.UsageError(
            f"--template: unknown {template!r}, expected one of {', '.join(TEMPLATES)}"
        )
    try:
        mesh = make_mesh(-1, fsdp, tensor)
    except ValueError as error:
        raise cli.UsageError(str(error)) from error
    loaded = E5V.from_pretrained(
        model, dtype=dtype, adapter=adapter, template=template, quantize=quantize, mesh=mesh
    )
    about = {}
    if cache is not None:
        about = {"model": model_key(resolve(model, None), adapter), "dtype": dtype}
        if quantize is not None:
            about["quantize"] = quantize
    return Embedder(loaded, batch_size=batch_size, cache=cache, about=about)


def normalised(vectors: np.ndarray) -> np.ndarray:
    """[N, D] to unit length."""
    scaled: np.ndarray = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return scaled


def _check(vectors: np.ndarray, places: Sequence[str]) -> None:
    if vectors.ndim != 2 or len(vectors) != len(places):
        raise ValueError(
            f"embeddings have shape {vectors.shape}, expected ({len(places)}, dimensions)"
        )
    squares = np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64)  # [N]
    bad = np.flatnonzero(~np.isfinite(squares) | (squares == 0))
    if bad.size:
        raise ValueError(
            f"the embeddings of {bad.size} of {len(places)} inputs are zero or not finite, first "
            f"that of {places[bad[0]]}: is the model whole, does its dtype suffice?"
        )
