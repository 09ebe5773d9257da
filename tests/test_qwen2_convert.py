"""Files of Qwen2-VL, Qwen2.5-VL and Omni: read as the hub has them, converted, exported."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hf_models import difference
from qwen2_models import IMAGES, MAX_TOKENS, RECIPES, TEXTS, OldCase
from qwen_models import assert_same_files

from e5v_jax import E5V
from e5v_jax.checkpoints.from_hf import Args, convert
from e5v_jax.checkpoints.hf_source import open_source
from e5v_jax.checkpoints.to_hf import Args as ExportArgs
from e5v_jax.checkpoints.to_hf import convert as export
from e5v_jax.families import find_family


@pytest.mark.parametrize("name", RECIPES)
def test_there_and_back_again(name: str, qwen2: Callable[[str], OldCase], tmp_path: Path) -> None:
    """Converted and exported to the same bits; of Omni's thinker all but its ears."""
    case = qwen2(name)
    convert(Args(str(case.folder), tmp_path / "ours"))
    if name == "omni":
        limits = {"min_pixels": 4 * 64, "max_pixels": MAX_TOKENS * 64}
        model = E5V.from_pretrained(tmp_path / "ours", dtype="float32", **limits)
        items = [TEXTS[0], *IMAGES[:2]]
        assert model.config == case.e5v.config
        assert difference(model.encode(items), case.e5v.encode(items)) <= 1e-6
    export(ExportArgs(tmp_path / "ours", tmp_path / "theirs"))
    assert_same_files(case.folder, tmp_path / "theirs", without=("audio_tower.",))


def rewritten(case: OldCase, folder: Path, raw: dict[str, Any], start: str = "") -> Path:
    """The case's weights, their names begun otherwise, with another configuration."""
    tensors = safetensors.numpy.load_file(case.folder / "model.safetensors")
    if start:
        tensors = {start + key: array for key, array in tensors.items()}
        tensors |= {f"{part}.a.weight": np.zeros(2) for part in ("talker", "token2wav")}
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


@pytest.mark.parametrize("name", ["qwen2", "qwen2.5"])
def test_files_of_the_hub(name: str, qwen2: Callable[[str], OldCase], tmp_path: Path) -> None:
    """Their decoder's fields stand at the top, and some have other names."""
    case = qwen2(name)
    raw = json.loads((case.folder / "config.json").read_text())
    text, vision = raw.pop("text_config"), raw["vision_config"]
    rope = text.pop("rope_parameters")
    for key in ("model_type", "layer_types", "pad_token_id"):
        text.pop(key)
    for key in ("in_channels", "rope_parameters", "dtype"):
        vision.pop(key, None)
    vision |= {"in_chans": 3, "spatial_patch_size": 4, "model_type": raw["model_type"]}
    raw |= {**text, "vision_token_id": 263, "sliding_window": 32768, "rope_theta": 50000.0}
    raw["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    source = open_source(rewritten(case, tmp_path, raw))
    assert source.config == case.e5v.config


def test_all_of_omni(qwen2: Callable[[str], OldCase], tmp_path: Path) -> None:
    """Its thinker is found by its names; what speaks is left out."""
    case = qwen2("omni")
    thinker = json.loads((case.folder / "config.json").read_text())
    raw = {"model_type": "qwen2_5_omni", "thinker_config": thinker, "talker_config": {},
           "token2wav_config": {}, "enable_audio_output": True}  # fmt: skip
    source, expected = open_source(rewritten(case, tmp_path, raw, "thinker.")), None
    expected = open_source(case.folder)
    assert source.config == expected.config
    names = list(expected.shapes())
    for name, ours, theirs in zip(names, source.read(names), expected.read(names), strict=True):
        np.testing.assert_array_equal(ours, theirs, err_msg=name)
    assert find_family(raw).hf_config(raw, source.config) == thinker
