"""What people pass to ``encode``: inputs in any container, prompts, other libraries' arguments.

Nothing is guessed: what is not followed is refused by its name, with what to do instead.
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from e5v_jax.data.inputs import ImageSource, Input
from e5v_jax.families.base import Processor
from e5v_jax.prompts import PromptChoice, SpecialTokens, Truncate

# Arguments of sentence-transformers' encode: what they may be, as it is what is done; what to do.
_OF_OTHERS: dict[str, tuple[Any, str]] = {
    "sentences": (None, "give them as inputs"),
    "convert_to_numpy": (True, "vectors are a NumPy array: list(vectors) makes a list of them"),
    "convert_to_tensor": (
        False,
        "vectors are a NumPy array: torch.from_numpy makes a tensor of it",
    ),
    "output_value": ("sentence_embedding", "only the vectors of inputs are computed"),
    "precision": ("float32", "vectors are float32: vectors.astype makes others of them"),
    "device": (None, "E5V.from_pretrained's mesh says the devices"),
    "chunk_size": (None, "all devices share each batch: give batch_size"),
}
_NUMBERS = ("batch_size", "max_num_batched_tokens", "truncate_dim", "max_length")
_TEXTS = ("prompt_name", "prompt", "instruction")


def collect_inputs(
    inputs: Input | Iterable[Input] | None, images: ImageSource | str | Iterable[Any] | None
) -> tuple[list[Input], bool]:
    """List the inputs of a call, and say whether it is a single one that stands alone.

    ``images`` are images instead, and a str among them is a path. Raises ValueError: both or
    neither are given, or a container that has no order or no inputs in it.
    """
    if (inputs is None) == (images is None):
        raise ValueError("give inputs or images; one with both is {'text': ..., 'image': ...}")
    if images is None:
        return _collect("inputs", inputs)
    items, single = _collect("images", images)
    return [{"image": image} for image in items], single


def _collect(name: str, given: Any) -> tuple[list[Any], bool]:
    kind = type(given).__name__
    if isinstance(given, str | bytes | Path | Image.Image | Mapping):
        return [given], True
    if isinstance(given, set | frozenset):
        raise ValueError(f"{name}: a {kind} has no order for the vectors: give a list")
    if kind in ("DataFrame", "LazyFrame"):
        raise ValueError(f"{name}: a {kind} is no list of inputs: give a column, frame['text']")
    if isinstance(given, np.ndarray) and (given.ndim != 1 or given.dtype.kind in "biufc"):
        shape = list(given.shape)
        raise ValueError(
            f"{name}: an array of {given.dtype} {shape}, expected a row of texts or images; "
            "PIL.Image.fromarray makes an image of pixels"
        )
    to_list = getattr(given, "to_pylist", None)  # of Arrow, whose items are its own kind
    items = to_list() if to_list is not None else given
    if not isinstance(items, Iterable):
        return [given], True
    # NumPy's strings hold no more than Python's, which tokenizers know
    return [str(item) if isinstance(item, np.str_) else item for item in items], False


def check_arguments(given: Mapping[str, Any], others: Mapping[str, Any]) -> None:
    """Refuse an argument of ``encode`` of a wrong type, and the ``others`` that it does not have.

    Raises ValueError: one of another library asks for what is not done, or a type is wrong;
    TypeError, as Python does: nobody knows it.
    """
    for name, value in others.items():
        if name not in _OF_OTHERS:
            raise TypeError(f"encode() got an unexpected keyword argument {name!r}")
        harmless, advice = _OF_OTHERS[name]
        if value is not harmless and value != harmless:
            raise ValueError(f"{name} {value!r}: {advice}")
    for name, value in given.items():
        kind = "a whole number" if name in _NUMBERS else "a str" if name in _TEXTS else "a bool"
        if value is None and name != "normalize_embeddings":
            continue
        if name in _NUMBERS:
            fits = hasattr(value, "__index__") and not isinstance(value, bool)
        else:
            fits = isinstance(value, str if name in _TEXTS else bool)
        if not fits:
            raise ValueError(f"{name} {value!r}: expected {kind}")


def choose_prompts(
    processor: Processor,
    *,
    prompt_name: str | None = None,
    prompt: str | None = None,
    instruction: str | None = None,
    max_length: int | None = None,
    truncate: Truncate = "none",
    special_tokens: SpecialTokens = "text",
) -> PromptChoice:
    """What is said with the inputs of a call, as the arguments of ``encode`` say it.

    Raises ValueError: an unknown prompt, an instruction that has no place or cannot be read, or a
    ``max_length`` of more than the model takes.
    """
    prompts = replace(
        processor.preset.choose(prompt_name, prompt, instruction),
        max_length=max_length,
        truncate=truncate,
        special_tokens=special_tokens,
    )
    processor.longest(max_length)  # refuses one that is more
    if instruction is not None:
        try:
            processor.check_text(instruction, special_tokens="refuse")
        except ValueError as error:
            raise ValueError(f"instruction: {error}") from error
    return prompts


class Process:
    """The process in which JAX was first used here: in a fork of it JAX waits for ever."""

    _id: int | None = None

    @classmethod
    def check(cls) -> None:
        """Note this process, or raise RuntimeError: it is a fork of the one that was noted."""
        own = os.getpid()
        if cls._id is None:
            cls._id = own
        if cls._id != own:
            raise RuntimeError(
                f"process {own} is a fork of {cls._id}, which has used JAX, whose threads are "
                'missing here: start processes by multiprocessing.get_context("spawn") and load '
                "the model in them"
            )
