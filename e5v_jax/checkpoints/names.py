"""The keys of a Hugging Face checkpoint, each accounted for by a row of its family's parameters."""

import re
from collections.abc import Iterable

from e5v_jax.nn.parameters import ParameterTable, Slot, name_pattern

# Keys that no row takes: they are computed from rope_theta, and 0, 1, 2, ...
_IGNORED = re.compile(r".*rotary_emb\.inv_freq|.*embeddings\.position_ids")


def find_slot(
    key: str, table: ParameterTable, places: Iterable[tuple[str, str]] | None = None
) -> Slot | None:
    """What ``key`` holds if its section is at one of ``places``: (section, prefix), by default all.

    Its layer may be one that the model has not.
    """
    if places is None:
        places = [(name, prefix) for name, s in table.sections.items() for prefix in s.prefixes]
    # the longest prefix first: "model." of the text is also a prefix of "model.vision_tower."
    for section, prefix in sorted(places, key=lambda place: -len(place[1])):
        if not key.startswith(prefix):
            continue
        name = key.removeprefix(prefix)
        for start, ours in table.sections[section].renamed.items():
            if name.startswith(start):
                name = ours + name.removeprefix(start)
        for row in table.rows:
            if row.section == section and (match := name_pattern(row.hf).fullmatch(name)):
                layer = match.groupdict().get("i")
                return Slot(row, None if layer is None else int(layer))
    return None


def map_keys(keys: Iterable[str], table: ParameterTable) -> dict[str, Slot]:
    """Map every key, strictly, to what it holds, some of which only an export needs.

    Raises ValueError: a key that is missing, that no row knows, that is one too many or repeats
    another (it is named), or no text model at all.
    """
    keys = sorted(keys)
    present = set(keys)
    found = {
        name: prefix
        for name, section in table.sections.items()
        for prefix in reversed(section.prefixes)  # of several, the first in the row wins
        if any(prefix + anchor in present for anchor in section.anchors)
    }
    if "text" in table.sections and "text" not in found:
        raise ValueError(
            "no embed_tokens.weight under any known prefix: not a Llama or LLaVA-NeXT checkpoint "
            f"(first key: {keys[0] if keys else 'none'})"
        )
    places = list(found.items())
    needed = {row.section for row in table.rows if row.name}
    for section in found.keys() - needed:  # what nobody needs may be under any prefix
        places += [(section, prefix) for prefix in table.sections[section].prefixes]
    holders: dict[Slot, str] = {}
    expected = set(table.slots)
    for key in keys:
        if _IGNORED.fullmatch(key) or any(re.fullmatch(p, key) for p in table.ignored):
            continue
        slot = find_slot(key, table, places)
        if slot is None:
            raise ValueError(
                f"{key}: one too many: an unknown key, no row of the family's takes it"
            )
        if slot not in expected:
            raise ValueError(f"{key}: one too many; the configuration has no place for it")
        if slot in holders:
            raise ValueError(f"{key}: holds the same parameter as {holders[slot]}")
        holders[slot] = key
    for slot in table.stored.values():
        if slot not in holders:
            key, shape = slot.key({**table.export_prefixes, **found}), list(slot.row.hf_shape)
            raise ValueError(f"{key}: missing; the configuration asks for it, shape {shape}")
    return {key: slot for slot, key in holders.items()}
