"""Qwen2-VL, Qwen2.5-VL and Omni's thinker against PyTorch's on random models, and what is new."""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
from hf_models import picture
from qwen2_models import RECIPES, OldCase, build_old

TEXTS = ["A dog sits.", "Fußball 🎉!"]
IMAGES: list[Any] = [
    picture(70, 45),  # portrait, 9 x 6 tokens of 8 pixels: windows of 4 x 4 are cut off
    picture(40, 56),
    picture(32, 64),  # two whole windows
    picture(6, 200),  # thin, and less than the least
    picture(400, 2),  # 200 to 1
    picture(1, 1),
    picture(3, 100),
    picture(100, 90),  # larger than the cap of 50 tokens
    picture(33, 31, 2),
]
ITEMS = [TEXTS[0], *IMAGES, {"text": "at night", "image": picture(20, 90)}, TEXTS[1]]
MAX_TOKENS = 50  # all images in the smallest bucket: one program


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], OldCase]:
    """Random tiny models by name; images have at most MAX_TOKENS tokens."""

    @cache
    def make(name: str) -> OldCase:
        case = build_old(RECIPES[name], tmp_path_factory.mktemp(name))
        case.max_tokens = MAX_TOKENS
        return case

    return make


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    assert ours.shape == theirs.shape and ours.dtype == np.float32
    return float(np.abs(ours - theirs).max())


# --- whole models --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_embeddings_equal_torch(name: str, old: Callable[[str], OldCase]) -> None:
    case = old(name)
    theirs = case.torch_embed(ITEMS)
    assert (theirs @ theirs.T - np.eye(len(ITEMS))).max() < 0.999  # the items are told apart
    assert difference(case.e5v.encode(ITEMS), theirs) <= 1e-5
