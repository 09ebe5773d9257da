"""The model families: each a folder with its configuration, model, processor and parameters.

A family is added by its folder and its line in :data:`FAMILIES`; nothing else knows it by name.
"""

import re
from typing import Any

from e5v_jax.families.base import Family, ModelConfig
from e5v_jax.families.llava_next import LLAVA_NEXT
from e5v_jax.families.qwen_vl import QWEN_VL
from e5v_jax.families.qwen_vl.layouts import JINA
from e5v_jax.families.text import TEXT
from e5v_jax.nn.config import UnsupportedModelError

FAMILIES: dict[str, Family] = {
    "llama": TEXT,
    "mistral": TEXT,
    "qwen2": TEXT,
    "qwen3": TEXT,
    "llava_next": LLAVA_NEXT,
    "llava_onevision": LLAVA_NEXT,
    "llava": LLAVA_NEXT,
    "llava_llama": LLAVA_NEXT,
    "llava_mistral": LLAVA_NEXT,
    "qwen2_vl": QWEN_VL,
    "qwen2_5_vl": QWEN_VL,
    "qwen2_5_omni": QWEN_VL,
    "qwen2_5_omni_thinker": QWEN_VL,
    "qwen3_vl": QWEN_VL,
}
"""By the ``model_type`` of a ``config.json``."""


_MODEL_TYPES = {JINA: "qwen2_5_vl"}
"""Of classes whose checkpoints' ``config.json`` does not say it."""


def with_model_type(raw: dict[str, Any]) -> dict[str, Any]:
    """A parsed ``config.json`` with the ``model_type`` that its class has, where it has none."""
    classes = raw.get("architectures")
    name = str(classes[0]) if isinstance(classes, list) and classes else ""
    if "model_type" in raw or name not in _MODEL_TYPES:
        return raw
    return {"model_type": _MODEL_TYPES[name], **raw}


def find_family(raw: dict[str, Any]) -> Family:
    """The family of a parsed ``config.json``. Raises UnsupportedModelError: there is none."""
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        names = raw.get("architectures")
        name = names[0] if isinstance(names, list) and names else model_type
        raise UnsupportedModelError(
            f"unsupported architecture {name!r} (model_type {model_type!r}): expected one of the "
            f"model types {', '.join(FAMILIES)}"
        )
    return FAMILIES[model_type]


def architectures() -> dict[str, tuple[Family, ModelConfig]]:
    """The architectures that have a name, for what needs no weights: dry runs and benchmarks."""
    return {
        name: (family, config)
        for family in FAMILIES.values()
        for name, config in family.architectures.items()
    }


def architecture_of(folder_name: str) -> str | None:
    """The architecture that the name of a model folder says, or None."""
    for family in FAMILIES.values():
        for pattern, name in family.checkpoints.items():
            if re.fullmatch(pattern, folder_name, re.IGNORECASE):
                return name
    return None
