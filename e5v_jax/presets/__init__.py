"""How the authors of embedding models call them, by name: what a checkpoint's files do not say."""

import re

from e5v_jax.presets.llava_next import E5_V, LLAVA_NEXT
from e5v_jax.presets.preset import ROLES, Preset, Role
from e5v_jax.presets.qwen_vl import QWEN_VL

__all__ = ["E5_V", "HELP", "PRESETS", "ROLES", "Preset", "Role", "check_preset", "find_preset"]

PRESETS: dict[str, Preset] = {preset.name: preset for preset in (*LLAVA_NEXT, *QWEN_VL)}
_REFUSED = {
    "moca-.*": "its tokens see those after them too (MoCa, arXiv 2506.23115), which is not computed"
}
"""Patterns of names of checkpoints that look like others in every file, and why they are not."""
HELP = (
    "How the model's authors call it: prompts, size of images, pooled token. By default told from "
    "the converted folder or the name: "
    + "; ".join(f"{preset.name}, {preset.about}" for preset in PRESETS.values())
    + ". More: docs/models.md."
)
"""Of the flag ``--preset``."""


def check_preset(name: str) -> None:
    """Raise ValueError, which lists the names, on a name that no preset has."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}: expected one of {', '.join(PRESETS)}")


def find_preset(given: str | None, *told: str) -> Preset:
    """The preset that is ``given`` by its name, or the first that something ``told`` names.

    That may be a preset's own name, as a converted folder has it, a hub id, a path or a class of
    config.json. What names none is as E5-V.
    Raises ValueError: as :func:`check_preset`, or a name is of a checkpoint that is not supported.
    """
    if given is not None:
        check_preset(given)
        return PRESETS[given]
    for name in (text.rstrip("/").rpartition("/")[2] for text in told):
        for pattern, reason in _REFUSED.items():
            if re.fullmatch(pattern, name, re.IGNORECASE):
                raise ValueError(f"{name}: {reason} here: choose another model")
        for preset in PRESETS.values():
            own = name in (preset.name, preset.architecture)
            if own or re.fullmatch(preset.checkpoints, name, re.IGNORECASE):
                return preset
    return E5_V
