"""Rotary positions (RoFormer, arXiv 2104.09864): frequencies, angles, and turning by them.

Frequencies are host numbers. Each operation on them is the reference's (transformers'
modeling_rope_utils.py) in the same order and precision, to the last bit: one unit in the last place
turns position 8000 by 5e-4 rad.
"""

import math
from dataclasses import dataclass, fields
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from e5v_jax.nn.config import LARGEST, UnsupportedModelError
from e5v_jax.nn.power import power

_NUMBERS = {
    "linear": ("factor",),
    "yarn": ("factor", "attention_factor", "original_max_position_embeddings", "beta_fast",
             "beta_slow", "truncate"),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor",
               "high_freq_factor"),
}  # fmt: skip
"""What each type of scaling is given by."""
_KEYS = {
    "default": (),
    "dynamic": ("factor",),
    **_NUMBERS,
    "yarn": (*_NUMBERS["yarn"], "mscale", "mscale_all_dim"),
}
"""What each type reads of ``rope_parameters``, beside what every type has."""


@dataclass(frozen=True)
class RopeScaling:
    """How frequencies are scaled for texts that are longer than those first trained on."""

    rope_type: str  # "linear", "yarn" or "llama3"
    factor: float
    attention_factor: float | None = None  # of cos and sin
    original_max_position_embeddings: int | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    truncate: bool | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None

    def __post_init__(self) -> None:
        """Check that the type has its numbers and no others. Raises ValueError: names the field."""
        if self.rope_type not in _NUMBERS:
            raise UnsupportedModelError(
                f"rope_type is {self.rope_type!r}: expected one of {', '.join(_NUMBERS)}"
            )
        for name in (field.name for field in fields(self)[1:]):
            value = getattr(self, name)
            if name not in _NUMBERS[self.rope_type]:
                if value is not None:
                    raise ValueError(f"{name} is {value!r}: {self.rope_type!r} has no such number")
            elif name == "truncate":
                if type(value) is not bool:
                    raise ValueError(f"truncate is {value!r}: expected true or false")
            else:
                _check(name, value)
        if self.rope_type == "llama3" and self.low_freq_factor >= self.high_freq_factor:  # type: ignore[operator]  # checked above
            raise ValueError(
                f"low_freq_factor is {self.low_freq_factor!r}: expected less than high_freq_factor "
                f"{self.high_freq_factor!r}"
            )

    @classmethod
    def from_hf(cls, rope: dict[str, Any], max_position_embeddings: int) -> Self | None:
        """Read ``rope_parameters`` as transformers hands them over; None is unscaled.

        "dynamic" is unscaled too: transformers leaves the frequencies as they are up to
        ``max_position_embeddings``, and makes them depend on the longest text of the batch beyond,
        where inputs are refused by their length. Raises UnsupportedModelError: a type that is not
        computed, or a key that it does not read. Raises ValueError: names the key.
        """
        kind = rope.get("rope_type", "default")
        if kind not in _KEYS:
            raise UnsupportedModelError(
                f"rope_type {kind!r} is not supported: expected one of {', '.join(_KEYS)}"
            )
        if (old := rope.get("type", kind)) not in (kind, "mrope"):  # "mrope" is a default one
            raise ValueError(f"rope_type is {kind!r}, but type is {old!r}: expected the same")
        if rope.get("partial_rotary_factor") not in (None, 1):
            raise UnsupportedModelError(
                f"partial_rotary_factor is {rope['partial_rotary_factor']!r}: only 1 is supported"
            )
        common = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
        for key in rope:
            if key not in (*common, *_KEYS[kind]):
                raise UnsupportedModelError(
                    f"rope_parameters has {key!r}, which is not supported with rope_type {kind!r}"
                )
        if kind == "default":
            return None
        given: dict[str, Any] = {name: rope.get(name) for name in _KEYS[kind]}
        if kind == "yarn":
            _complete_yarn(given, max_position_embeddings, truncate=rope.get("truncate", True))
        _check("factor", given["factor"])
        if kind == "dynamic":
            return None
        return cls(kind, **given)


def _check(name: str, value: Any) -> None:
    low = 1 if name in ("factor", "original_max_position_embeddings") else 0
    whole = name == "original_max_position_embeddings"
    # a bool is an int to Python, and NaN is in no range
    right = type(value) is int or (type(value) is float and not whole)
    if not right or not low <= value <= LARGEST or not value:
        above = f"from {low}" if low else "above 0"
        what = "a whole number" if whole else "a number"
        raise ValueError(f"{name} is {value!r}: expected {what} {above} to {LARGEST}")


def _complete_yarn(given: dict[str, Any], max_positions: int, *, truncate: Any) -> None:
    """Put in what a yarn section leaves out, as transformers computes it."""
    original = "original_max_position_embeddings"
    _check(original, given[original])
    if given["factor"] is None:
        given["factor"] = max_positions / given[original]
    mscales = [given.pop("mscale"), given.pop("mscale_all_dim")]
    if given["attention_factor"] is None:
        _check("factor", given["factor"])

        def mscale(scale: float) -> float:
            factor = given["factor"]
            return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

        given["attention_factor"] = mscale(1)
        if all(mscales):
            _check("mscale", mscales[0])
            _check("mscale_all_dim", mscales[1])
            given["attention_factor"] = mscale(mscales[0]) / mscale(mscales[1])
    given["beta_fast"] = given["beta_fast"] or 32
    given["beta_slow"] = given["beta_slow"] or 1
    given["truncate"] = truncate


def rope_frequencies(
    *, head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> np.ndarray:
    """Radians per position, fp32 [head_dim / 2]."""
    one = np.float32(1)
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    wavelength = power(theta, exponent)
    frequency = one / wavelength  # [H/2]
    if scaling is None:
        return frequency
    factor = np.float32(scaling.factor)
    if scaling.rope_type == "linear":
        return frequency / factor
    if scaling.rope_type == "llama3":
        return _llama3(frequency, scaling)
    kept = one - _yarn_ramp(scaling, head_dim, theta)
    return one / (factor * wavelength) * (one - kept) + frequency * kept


def _yarn_ramp(scaling: RopeScaling, head_dim: int, theta: float) -> np.ndarray:
    """How far each frequency is interpolated, fp32 [H/2], 0 to 1 (Peng et al., 2309.00071)."""

    def dimension(rotations: float | None) -> float:
        longest = scaling.original_max_position_embeddings
        turns = math.log(longest / (rotations * 2 * math.pi))  # type: ignore[operator]  # yarn has both
        return (head_dim * turns) / (2 * math.log(theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    place = np.arange(head_dim // 2, dtype=np.float32)
    return np.clip((place - np.float32(low)) / np.float32(high - low), 0, 1)


def _llama3(frequency: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Long waves are stretched by the factor, short ones kept, those between mixed."""
    one, factor = np.float32(1), np.float32(scaling.factor)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    length = scaling.original_max_position_embeddings
    assert low is not None and high is not None and length is not None
    wavelength = one / frequency * np.float32(2 * math.pi)  # torch divides by reciprocals
    long, short = np.float32(length / low), np.float32(length / high)
    scaled = np.where(wavelength > long, frequency / factor, frequency)
    turns = one / wavelength * np.float32(length)
    smooth = (turns - np.float32(low)) / np.float32(high - low)
    mixed = (one - smooth) * scaled / factor + smooth * scaled
    between = ~(wavelength < short) & ~(wavelength > long)
    return np.where(between, mixed, scaled)


def mrope_axes(section: tuple[int, ...], *, interleaved: bool) -> np.ndarray:
    """The axis (0 time, 1 row, 2 column) whose position each frequency takes, [sum of section].

    Chunked as Qwen2-VL has it: the sizes in ``section`` one after the other. Interleaved as
    Qwen3-VL has it: every third frequency from the second takes the row, from the third the column.
    """
    if not interleaved:
        return np.repeat(np.arange(len(section)), section)
    axes = np.zeros(sum(section), np.int64)
    for axis in (1, 2):
        axes[axis : 3 * section[axis] : 3] = axis
    return axes


def rope_angles(
    positions: jax.Array, frequency: np.ndarray, axes: np.ndarray | None = None
) -> jax.Array:
    """Rotary angles, fp32 [..., H/2].

    ``positions`` are int [...]; or with ``axes`` [H/2] int [..., 3], of which each frequency takes
    that of its axis.
    """
    places = positions.astype(jnp.float32)  # bf16 rounds position 257 to 256
    return (places[..., None] if axes is None else places[..., axes]) * frequency


def apply_rope(x: jax.Array, angles: jax.Array, scale: float = 1.0) -> jax.Array:
    """Rotate x [B, T, N, H] by angles [T, H/2] or [B, T, H/2], times ``scale``.

    Halves are paired as in Hugging Face's Llama.
    """

    def table(values: jax.Array) -> jax.Array:
        if scale != 1:
            values = values * scale  # in fp32
        new = (0, 2) if angles.ndim == 2 else (2,)
        return jnp.expand_dims(values, new).astype(x.dtype)  # [1 or B, T, 1, H/2]

    cos, sin = table(jnp.cos(angles)), table(jnp.sin(angles))
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
