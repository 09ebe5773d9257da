"""Comparing what an image processor's file says with what is computed here."""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from e5v_jax.nn.config import UnsupportedModelError


def check_settings(
    settings: Mapping[str, Any],
    supported: Mapping[str, tuple[Any, ...]],
    ignored: Collection[str],
) -> None:
    """Raise UnsupportedModelError, naming it, on a setting that has none of its values here."""
    for name, value in settings.items():
        if name in ignored:
            continue
        if name not in supported:
            raise UnsupportedModelError(f"{name} is {value!r}: this setting is not known")
        if not any(_same(value, one) for one in supported[name]):
            raise UnsupportedModelError(
                f"{name} is {value!r}: only {supported[name][0]!r} is supported"
            )


def _same(found: Any, expected: Any) -> bool:
    if isinstance(expected, bool) or expected is None or isinstance(expected, str | dict):
        return bool(found == expected) and type(found) is type(expected)
    try:  # some files round what they say
        return np.shape(found) == np.shape(expected) and np.allclose(found, expected, 1e-6, 0)
    except (TypeError, ValueError):
        return False
