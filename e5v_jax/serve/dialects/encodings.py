"""Vectors as clients ask for them: fewer dimensions, and numbers of fewer bits."""

import base64
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import numpy as np

from e5v_jax.serve.dialects.task import Refusal

Encoding = Literal["float", "base64", "int8", "uint8", "binary", "ubinary"]
ENCODINGS: tuple[Encoding, ...] = get_args(Encoding)


def cut(vector: np.ndarray, dimensions: int | None) -> np.ndarray:
    """Keep the first dimensions of a unit vector, and scale it to unit length again."""
    if dimensions is None or dimensions == len(vector):
        return vector
    kept: np.ndarray = vector[:dimensions]
    return kept / max(float(np.linalg.norm(kept)), 1e-12)


def check_encoding(encoding: Encoding, dimensions: int, *, field: str) -> None:
    """Raise Refusal: bits that fill no whole bytes."""
    if encoding in ("binary", "ubinary") and dimensions % 8:
        raise Refusal(
            400,
            f"{encoding} needs dimensions in eights, these are {dimensions}",
            field=field,
        )


def encode_vector(vector: np.ndarray, encoding: Encoding) -> Any:
    """A vector [D] of unit length as JSON has it.

    base64 is of little-endian float32. int8 is scaled so that the vector's largest value is 127 or
    -127, which keeps its direction: compare by cosine; uint8 is int8 plus 128. ubinary has a bit
    for each dimension that is positive, the first one the highest of its byte; binary is ubinary
    less 128.
    """
    return _ENCODERS[encoding](vector)


def _base64(vector: np.ndarray) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii")


def _int8(vector: np.ndarray) -> list[int]:
    largest = max(float(np.abs(vector).max()), 1e-12)
    return _listed(np.rint(vector * (127 / largest)).astype(np.int32))


def _ubinary(vector: np.ndarray) -> list[int]:
    return _listed(np.packbits(vector > 0))


def _listed(values: np.ndarray) -> list[int]:
    return [int(value) for value in values.tolist()]


def _shifted(values: Sequence[int], shift: int) -> list[int]:
    return [value + shift for value in values]


_ENCODERS: dict[Encoding, Callable[[np.ndarray], Any]] = {
    "float": lambda vector: vector.tolist(),
    "base64": _base64,
    "int8": _int8,
    "uint8": lambda vector: _shifted(_int8(vector), 128),
    "binary": lambda vector: _shifted(_ubinary(vector), -128),
    "ubinary": _ubinary,
}
