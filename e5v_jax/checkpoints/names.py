"""The keys of a Hugging Face checkpoint, each accounted for by a row of its family's parameters."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from e5v_jax.nn.parameters import ParameterTable, Section, Slot, name_pattern

IGNORED: dict[str, str] = {
    r".*rotary_emb\.inv_freq": "computed from rope_theta",
    r".*embeddings\.position_ids": "0, 1, 2, ...",
}
"""Keys that no row takes, and why they cannot matter."""


@dataclass(frozen=True)
class KeyMap:
    """Every key of a checkpoint."""

    prefixes: dict[str, str]
    """The prefix of each section, as this checkpoint has it if it has the section."""
    slots: dict[str, Slot]
    """What each key holds; some of it only an export needs."""
    ignored: list[str]


def find_prefixes(keys: Iterable[str], sections: Mapping[str, Section]) -> dict[str, str]:
    """The prefix of each section present in ``keys``, found by its anchor."""
    present = set(keys)
    return {
        name: next(prefix for prefix in section.prefixes if _has(present, prefix, section))
        for name, section in sections.items()
        if any(_has(present, prefix, section) for prefix in section.prefixes)
    }


def _has(present: set[str], prefix: str, section: Section) -> bool:
    return any(prefix + anchor in present for anchor in section.anchors)


def map_keys(keys: Iterable[str], table: ParameterTable) -> KeyMap:
    """Map every key, strictly.

    Raises:
        ValueError: a key that no row knows or that repeats another (it is named), or no text
            model at all.
    """
    keys = sorted(keys)
    found = find_prefixes(keys, table.sections)
    if "text" not in found:
        raise ValueError(
            "no embed_tokens.weight under any known prefix: not a Llama or LLaVA-NeXT checkpoint "
            f"(first key: {keys[0] if keys else 'none'})"
        )
    patterns = [(row, name_pattern(row.hf)) for row in table.rows]
    places = list(found.items())
    needed = {row.section for row in table.rows if row.name}
    for section in found.keys() - needed:  # what nobody needs may be under any prefix
        places += [(section, prefix) for prefix in table.sections[section].prefixes]
    # the longest prefix first: "model." of the text is also a prefix of "model.vision_tower."
    places.sort(key=lambda place: -len(place[1]))

    def slot_of(key: str) -> Slot:
        for section, prefix in places:
            if not key.startswith(prefix):
                continue
            name = key.removeprefix(prefix)
            for start, ours in table.sections[section].renamed.items():
                if name.startswith(start):
                    name = ours + name.removeprefix(start)
            for row, pattern in patterns:
                if row.section == section and (match := pattern.fullmatch(name)):
                    layer = match.groupdict().get("i")
                    return Slot(row, None if layer is None else int(layer))
        raise ValueError(f"{key}: one too many: an unknown key, no row of the family's takes it")

    result = KeyMap({**table.export_prefixes, **found}, {}, [])
    holders: dict[Slot, str] = {}
    for key in keys:
        if any(re.fullmatch(pattern, key) for pattern in IGNORED):
            result.ignored.append(key)
            continue
        slot = slot_of(key)
        if slot in holders:
            raise ValueError(f"{key}: holds the same parameter as {holders[slot]}")
        holders[slot] = key
        result.slots[key] = slot
    return result
