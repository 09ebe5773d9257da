"""Fields of Qwen's configurations: followed, refused by name or listed."""

import copy
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from qwen2_models import RECIPES, OldCase
from qwen_models import QwenRecipe, with_config

from e5v_jax.checkpoints.hf_source import open_source
from e5v_jax.families import find_family
from e5v_jax.families.qwen_vl import layouts, vision_config
from e5v_jax.nn.config import UnsupportedModelError
from e5v_jax.presets import find_preset

CONFIGS: list[tuple[str, dict[str, Any], str]] = [
    ("qwen2", {"vision_config.embed_dim": 44}, "not a multiple of num_heads 3"),
    ("qwen2", {"vision_config.window_size": 112}, "window_size is 112: this field is not known"),
    ("qwen2", {"vision_config.intermediate_size": 9}, "intermediate_size is 9: this field is"),
    ("qwen2", {"vision_config.mlp_ratio": 2}, "blocks.0.mlp.fc1.bias"),
    ("qwen2", {"vision_config.hidden_act": "gelu"}, "hidden_act 'gelu': only 'quick_gelu'"),
    ("qwen2", {"vision_config.spatial_patch_size": 5}, "spatial_patch_size is 5: only 4"),
    ("qwen2", {"vision_config.in_chans": 1}, "in_chans is 1: only 3"),
    ("qwen2.5", {"vision_config.window_size": 7}, "window_size is 7: expected at least the 8"),
    ("qwen2.5", {"vision_config.window_size": None}, "window_size"),
    ("qwen2.5", {"vision_config.fullatt_block_indexes": [0, 4]}, "expected blocks from 0 to 3"),
    ("qwen2.5", {"vision_config.hidden_act": "gelu"}, "hidden_act 'gelu': only 'silu'"),
    ("qwen2.5", {"vision_config.deepstack_visual_indexes": [0]}, "this field is not known"),
    ("qwen2.5", {"vision_config.depth": 3, "vision_config.fullatt_block_indexes": [1]},
     "visual.blocks.3.attn.proj.bias: one too many"),
    ("qwen2.5", {"text_config": 3}, "text_config is 3: expected an object"),
    ("qwen2.5", {"is_causal": False}, "is_causal is False: this field is not known"),
    ("qwen2.5", {"model_type": "qwen2_5_vl_moe"}, "model_type 'qwen2_5_vl_moe'"),
    ("omni", {"user_token": 3}, "user_token is 3: this field is not known"),
    ("omni", {"vision_start_token_id": None}, "vision_start_token_id is None: expected the id"),
    ("omni", {"model_type": "qwen2_5_omni"}, "is not known"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "message"), CONFIGS)
def test_configurations_that_are_refused(
    name: str,
    changes: dict[str, Any],
    message: str,
    qwen2: Callable[[str], OldCase],
    tmp_path: Path,
) -> None:
    folder = with_config(qwen2(name), tmp_path, changes)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        open_source(folder)
    assert "\n" not in str(error.value)


LISTED = {*layouts._NOT_NEEDED, *layouts._OMNI_NOT_NEEDED, *vision_config._NOT_NEEDED}
TOGETHER = {"use_sliding_window", "sliding_window", "max_window_layers"}  # none alone says a window
# What a message about a field may name in its place: what follows from it.
FOLLOWS = {
    "num_attention_heads": "head_dim",
    "hidden_size": "head",
    "embed_dim": "out_hidden_size",
    "rope_theta": "rope",
    "depth": "fullatt_block_indexes",
    "model_type": "unsupported architecture 'another'",
}


def changed(value: Any) -> Any:
    """Another value of the same kind."""
    match value:
        case bool():
            return not value
        case int() | float():
            return 2 * value
        case list():
            return value[:-1]
        case dict():
            return {"0": "a", "1": "b"}
        case None:
            return 7
    return "another"


def parts_of(raw: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every object in a configuration that has fields to change, by its dotted name."""
    yield "", raw
    for name, value in raw.items():
        if isinstance(value, dict) and name not in ("id2label", "label2id", "audio_config"):
            yield from ((f"{name}.{part}".rstrip("."), x) for part, x in parts_of(value))


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl", "qwen2_5_omni_thinker", "qwen3_vl"])
def test_no_field_is_ignored_in_silence(kind: str) -> None:
    """Each that transformers' class has, changed alone, is followed, refused by name or listed."""
    recipes = {recipe.kind: recipe for recipe in reversed(RECIPES.values())}
    hf = recipes[kind].config() if kind in recipes else QwenRecipe().config()
    saved, full = json.loads(hf.to_json_string()), json.loads(json.dumps(hf.to_dict()))

    def read(raw: dict[str, Any]) -> Any:
        return find_family(raw).read_config(raw)

    usual, outcomes = read(saved), Counter()
    for part, fields in parts_of(full):
        for name, value in fields.items():
            if isinstance(value, dict) and name not in ("id2label", "label2id"):
                continue
            raw = copy.deepcopy(saved)
            place = raw
            for key in filter(None, part.split(".")):
                place = place.setdefault(key, {})
            place[name] = changed(value)
            where = f"{part}.{name}".lstrip(".")
            try:
                same = read(raw) == usual
            except Exception as error:  # of transformers, many types
                assert name in str(error) or FOLLOWS.get(name, "?") in str(error), (where, error)
                outcomes["refused"] += 1
                continue
            listed = {
                *LISTED,
                *TOGETHER,
                *(layouts._TEXT_NOT_NEEDED if "vision" not in part else ()),
            }
            listed -= set() if part else set(layouts.TOKENS)
            assert not same or name in listed, where
            outcomes["listed" if same else "followed"] += 1
    print(kind, dict(outcomes))
    assert min(outcomes[name] for name in ("refused", "followed", "listed")) >= 10
    for part in ("", "text_config.", "vision_config."):
        raw = copy.deepcopy(saved)
        (raw[part[:-1]] if part else raw)["new"] = 3
        with pytest.raises(
            UnsupportedModelError, match=f"^{part}new is 3: this field is not known"
        ):
            read(raw)
    if kind != "qwen3_vl":
        raw = copy.deepcopy(saved)
        raw["text_config"] |= {"use_sliding_window": True, "sliding_window": 9, "layer_types": None,
                               "max_window_layers": 0}  # fmt: skip
        assert read(raw).text.sliding_window == 9


def test_moca_is_refused_by_its_name() -> None:
    """Nothing in its files says that its attention is not causal."""
    with pytest.raises(ValueError, match=r"^MoCa-Qwen25VL-3B: its tokens see those after them"):
        find_preset(None, "moca-embed/MoCa-Qwen25VL-3B")
