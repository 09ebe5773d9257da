"""Qwen3-VL against PyTorch's on random models: whole, block by block, and what is refused."""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
from hf_models import picture
from PIL import Image
from qwen_models import QWEN3_RECIPES, QwenCase, build_qwen3_vl

from e5v_jax.presets import PRESETS

PRESET = PRESETS["qwen3-vl-embedding"]
TEXTS = ["A dog sits.", "Zwei Männer spielen Fußball 🎉 im Regen, and a third one watches them."]


def transparent(height: int, width: int) -> Image.Image:
    """An image that shows what is under it, more towards the right."""
    image = picture(height, width, 3)
    alpha = np.tile(np.linspace(0, 255, width).astype(np.uint8), (height, 1))
    image.putalpha(Image.fromarray(alpha))
    return image


IMAGES: list[Any] = [
    picture(70, 45),  # portrait
    picture(40, 56),
    picture(50, 50),
    picture(6, 200),  # thin, and less than the least
    picture(400, 2),  # 200 to 1
    picture(1, 1),
    picture(3, 100),
    picture(200, 250),  # 775 tokens: larger than the cap of 600
    picture(104, 136),
]
ITEMS = [TEXTS[0], *IMAGES, {"text": "at night", "image": picture(20, 90)}, TEXTS[1]]
MAX_TOKENS = 600


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], QwenCase]:
    """Random tiny models by name; images have at most MAX_TOKENS tokens."""

    @cache
    def make(name: str) -> QwenCase:
        folder = tmp_path_factory.mktemp(name)
        case = build_qwen3_vl(QWEN3_RECIPES[name], folder, ends=True)
        case.max_tokens, case.preset = MAX_TOKENS, PRESET.name
        return case

    return make


def expected(case: QwenCase, items: list[Any]) -> np.ndarray:
    """The authors' way of calling: ``format_model_input``, the tokenizer's own last token."""
    head = "<|im_start|>system\nRepresent the user's input.<|im_end|>\n<|im_start|>user\n"
    tail = "<|im_end|>\n<|im_start|>assistant\n"
    vectors = []
    for item in items:
        item = (
            item if isinstance(item, dict) else {"text" if isinstance(item, str) else "image": item}
        )
        content = ("<image>" if "image" in item else "") + item.get("text", "")
        vectors.append(case.torch_vector(f"{head}{content}{tail}", item.get("image")))
    return np.stack(vectors)


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    assert ours.shape == theirs.shape and ours.dtype == np.float32
    return float(np.abs(ours - theirs).max())


# --- whole models --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", QWEN3_RECIPES)
def test_embeddings_equal_torch(name: str, qwen: Callable[[str], QwenCase]) -> None:
    case = qwen(name)
    theirs = expected(case, ITEMS)
    assert (theirs @ theirs.T - np.eye(len(ITEMS))).max() < 0.999  # the items are told apart
    assert difference(case.e5v.encode(ITEMS), theirs) <= 1e-5
