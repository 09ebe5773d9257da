"""ONE table between Hugging Face parameter names and ours, read in both directions.

A Hugging Face key is a section prefix, which differs between layouts, and a name inside the
section, which does not. ``{i}`` is the layer number.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

Transform = Literal["copy", "transpose", "conv"]
Section = Literal["text", "head", "vision", "projector", "newline"]


@dataclass(frozen=True)
class Rule:
    """One parameter: its section, its name there, our name, how the array changes."""

    section: Section
    hf: str
    ours: str
    transform: Transform = "copy"


def _text() -> list[Rule]:
    rules = [
        Rule("text", "embed_tokens.weight", "language_model.embed_tokens"),
        Rule("text", "norm.weight", "language_model.norm.scale"),
    ]
    hf, ours = "layers.{i}.", "language_model.layers.{i}."
    for name in ("input_layernorm", "post_attention_layernorm"):
        rules.append(Rule("text", f"{hf}{name}.weight", f"{ours}{name}.scale"))
    for name in (
        *(f"self_attn.{x}_proj" for x in "qkvo"),
        *(f"mlp.{x}_proj" for x in ("gate", "up", "down")),
    ):
        rules.append(Rule("text", f"{hf}{name}.weight", f"{ours}{name}.kernel", "transpose"))
    return rules


def _vision() -> list[Rule]:
    hf, ours = "embeddings.", "vision_tower."
    rules = [
        Rule("vision", f"{hf}class_embedding", f"{ours}class_embedding"),
        Rule("vision", f"{hf}patch_embedding.weight", f"{ours}patch_embedding.kernel", "conv"),
        Rule("vision", f"{hf}position_embedding.weight", f"{ours}position_embedding"),
        Rule("vision", "pre_layrnorm.weight", f"{ours}pre_layrnorm.scale"),
        Rule("vision", "pre_layrnorm.bias", f"{ours}pre_layrnorm.bias"),
    ]
    hf, ours = "encoder.layers.{i}.", "vision_tower.layers.{i}."
    for name in ("layer_norm1", "layer_norm2"):
        rules.append(Rule("vision", f"{hf}{name}.weight", f"{ours}{name}.scale"))
        rules.append(Rule("vision", f"{hf}{name}.bias", f"{ours}{name}.bias"))
    for name in (
        *(f"self_attn.{x}_proj" for x in ("q", "k", "v", "out")),
        *("mlp.fc1", "mlp.fc2"),
    ):
        rules.append(Rule("vision", f"{hf}{name}.weight", f"{ours}{name}.kernel", "transpose"))
        rules.append(Rule("vision", f"{hf}{name}.bias", f"{ours}{name}.bias"))
    return rules


def _projector() -> list[Rule]:
    rules = []
    for name in ("linear_1", "linear_2"):
        ours = f"multi_modal_projector.{name}"
        rules.append(Rule("projector", f"{name}.weight", f"{ours}.kernel", "transpose"))
        rules.append(Rule("projector", f"{name}.bias", f"{ours}.bias"))
    return rules


RULES: tuple[Rule, ...] = (
    *_text(),
    *_vision(),
    *_projector(),
    Rule("newline", "image_newline", "image_newline"),
)

PREFIXES: dict[Section, tuple[str, ...]] = {
    "text": ("language_model.model.", "model.language_model.", "model.", ""),
    "vision": (
        "vision_tower.vision_model.",
        "model.vision_tower.vision_tower.vision_model.",
        "model.vision_tower.vision_model.",
        "model.vision_tower.",
        "vision_tower.",
    ),
    "projector": ("multi_modal_projector.", "model.multi_modal_projector.", "model.mm_projector."),
    "newline": ("", "model."),
}
"""Where each section may start (reference.md section 1); the anchor below decides."""

ANCHORS: dict[Section, tuple[str, ...]] = {
    "text": ("embed_tokens.weight",),
    "vision": ("embeddings.class_embedding",),
    "projector": ("linear_1.weight", "0.weight"),
    "newline": ("image_newline",),
}

ORIGINAL_PROJECTOR = {"0.": "linear_1.", "2.": "linear_2."}
"""The original LLaVA code numbers the projector's layers."""

IGNORED: dict[str, str] = {
    r".*rotary_emb\.inv_freq": "computed from rope_theta",
    r".*embeddings\.position_ids": "0, 1, 2, ...",
}

UNUSED: dict[str, str] = {
    r"(.*\.)?lm_head\.weight": "an embedding needs no logits",
    r".*post_layernorm\.(weight|bias)": "features are taken before it",
}
"""Kept aside for export, besides the vision blocks after ``vision_feature_layer``."""

HF_PREFIXES: dict[Section, str] = {
    "text": "language_model.model.",
    "head": "language_model.",
    "vision": "vision_tower.vision_model.",
    "projector": "multi_modal_projector.",
    "newline": "",
}
"""What we export a LLaVA-NeXT model with: transformers 4 and 5 both read it."""

TEXT_PREFIXES: dict[Section, str] = {"text": "model.", "head": ""}
"""What we export a text-only model with."""


def apply(transform: Transform, array: np.ndarray) -> np.ndarray:
    """Hugging Face array -> ours. torch keeps [out, in]; a conv is [D, 3, p, p] -> [3*p*p, D]."""
    if transform == "conv":
        array = array.reshape(array.shape[0], -1)  # [D, 3*p*p]
    return array if transform == "copy" else np.ascontiguousarray(array.T)


def apply_shape(transform: Transform, shape: tuple[int, ...]) -> tuple[int, ...]:
    """What :func:`apply` does to a shape."""
    if transform == "conv":
        shape = (shape[0], int(np.prod(shape[1:])))
    return shape if transform == "copy" else shape[::-1]


def invert(transform: Transform, array: np.ndarray) -> np.ndarray:
    """Ours -> Hugging Face array: the inverse of :func:`apply`."""
    if transform == "copy":
        return array
    return np.ascontiguousarray(array.T).reshape(invert_shape(transform, array.shape))


def invert_shape(transform: Transform, shape: tuple[int, ...]) -> tuple[int, ...]:
    """What :func:`invert` does to a shape."""
    if transform == "conv":
        patch = math.isqrt(shape[0] // 3)
        return (shape[1], 3, patch, patch)
    return shape if transform == "copy" else shape[::-1]


def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.escape(template).replace(r"\{i\}", r"(?P<i>\d+)"))


_HF_PATTERNS = [(rule, _pattern(rule.hf)) for rule in RULES]
_OUR_PATTERNS = [(rule, _pattern(rule.ours)) for rule in RULES]


@dataclass(frozen=True)
class Mapped:
    """A source key that feeds the model: our name and the transform."""

    ours: str
    transform: Transform


@dataclass(frozen=True)
class KeyMap:
    """Every key of a checkpoint, accounted for."""

    prefixes: dict[Section, str]  # of the sections present
    mapped: dict[str, Mapped]  # source key -> our parameter
    unused: dict[str, str]  # source key -> the key it is exported under
    ignored: list[str]


def find_prefixes(keys: Iterable[str]) -> dict[Section, str]:
    """The prefix of each section present in ``keys``, found by its anchor."""
    present = set(keys)
    found: dict[Section, str] = {}
    for section, prefixes in PREFIXES.items():
        for prefix in prefixes:
            if any(prefix + anchor in present for anchor in ANCHORS[section]):
                found[section] = prefix
                break
    return found


def map_keys(keys: Iterable[str], *, num_vision_layers: int) -> KeyMap:
    """Map every source key, strictly.

    Raises:
        ValueError: a key that no rule knows or that repeats another (it is named), or no text
            model at all.
    """
    keys = sorted(keys)
    prefixes = find_prefixes(keys)
    if "text" not in prefixes:
        raise ValueError(
            "no embed_tokens.weight under any known prefix: not a Llama or LLaVA-NeXT checkpoint "
            f"(first key: {keys[0] if keys else 'none'})"
        )
    result = KeyMap(prefixes=prefixes, mapped={}, unused={}, ignored=[])
    targets: dict[str, str] = {}
    for key in keys:
        if any(re.fullmatch(pattern, key) for pattern in IGNORED):
            result.ignored.append(key)
            continue
        if any(re.fullmatch(pattern, key) for pattern in UNUSED):
            target = result.unused[key] = _unused_name(key, text_only="vision" not in prefixes)
        else:
            mapped, layer = _map_key(key, prefixes)
            if mapped.ours.startswith("vision_tower.layers.") and layer >= num_vision_layers:
                target = result.unused[key] = to_hf_name(mapped.ours, HF_PREFIXES)[0]
            else:
                result.mapped[key], target = mapped, mapped.ours
        if target in targets:
            raise ValueError(f"{key}: holds the same parameter as {targets[target]}")
        targets[target] = key
    return result


def _unused_name(key: str, *, text_only: bool) -> str:
    if key.endswith("lm_head.weight"):
        return (TEXT_PREFIXES if text_only else HF_PREFIXES)["head"] + "lm_head.weight"
    return HF_PREFIXES["vision"] + "post_layernorm." + key.rsplit(".", 1)[1]


def _map_key(key: str, prefixes: dict[Section, str]) -> tuple[Mapped, int]:
    # the longest prefix first: "model." of the text model is also a prefix of "model.vision_tower."
    for section in sorted(prefixes, key=lambda s: -len(prefixes[s])):
        prefix = prefixes[section]
        if not key.startswith(prefix):
            continue
        name = key.removeprefix(prefix)
        if section == "projector" and name[:2] in ORIGINAL_PROJECTOR:
            name = ORIGINAL_PROJECTOR[name[:2]] + name[2:]
        for rule, pattern in _HF_PATTERNS:
            if rule.section == section and (match := pattern.fullmatch(name)):
                i = match.groupdict().get("i", "0")
                return Mapped(rule.ours.replace("{i}", i), rule.transform), int(i)
    raise ValueError(f"{key}: unknown key; no rule in convert/names.py takes it")


def to_hf_name(ours: str, prefixes: Mapping[Section, str]) -> tuple[str, Transform]:
    """Our per-layer parameter name -> (Hugging Face key, transform to invert).

    ``prefixes`` are those of a checkpoint, :data:`HF_PREFIXES` or :data:`TEXT_PREFIXES`.
    """
    for rule, pattern in _OUR_PATTERNS:
        if match := pattern.fullmatch(ours):
            key = rule.hf.replace("{i}", match.groupdict().get("i", ""))
            return prefixes[rule.section] + key, rule.transform
    raise ValueError(f"{ours}: unknown parameter; no rule in convert/names.py makes it")
