"""Exported folders in the real sentence-transformers: the same vectors, told how by the files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hf_models import TEXT_RECIPES, Case, build_text, picture
from qwen_models import QwenRecipe, build_qwen3_vl
from sentence_transformers import SentenceTransformer
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from e5v_jax import E5V
from e5v_jax.checkpoints import from_hf, to_hf
from e5v_jax.checkpoints.sentence_transformers import check_steps
from e5v_jax.presets import PRESETS

ITEMS: list[Any] = [
    "A dog runs on the beach.",
    "Quotes \" and ' and {braces} {{ twice }} {% raw %}",
    picture(40, 60),
    picture(70, 30, seed=1),
    {"image": picture(30, 50, seed=2), "text": "now red"},
]


def exported(folder: Path, tmp_path: Path, preset: str | None = None) -> Path:
    from_hf.convert(from_hf.Args(str(folder), tmp_path / "ours", preset=preset))
    to_hf.convert(to_hf.Args(tmp_path / "ours", tmp_path / "theirs"))
    return tmp_path / "theirs"


def compare(folder: Path, items: list[Any]) -> None:
    theirs = SentenceTransformer(str(folder), device="cpu")
    ours = E5V.from_pretrained(folder.parent / "ours", dtype="float32").encode(items)
    vectors = np.stack([theirs.encode(item) for item in items])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(vectors, ours, atol=2e-5)
    together = theirs.encode(items[:2])  # one batch, padded
    np.testing.assert_allclose(together, ours[:2], atol=2e-5)


def test_llava_next(llava: Callable[[str], Case], tmp_path: Path) -> None:
    compare(exported(llava("llama-gqa").folder, tmp_path), ITEMS)


def test_text(tmp_path: Path) -> None:
    compare(
        exported(build_text(TEXT_RECIPES["llama"], tmp_path / "hf").folder, tmp_path), ITEMS[:2]
    )


def test_qwen3_vl(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """transformers' processor of it needs torchvision, which is not here: ids and its file only."""
    recipe = QwenRecipe(
        {"num_hidden_layers": 2, "vocab_size": 263}, {"depth": 2, "deepstack_visual_indexes": [0]}
    )
    case = build_qwen3_vl(recipe, tmp_path / "hf", ends=True)
    folder = exported(case.folder, tmp_path, "qwen3-vl-embedding")
    processor = E5V.load_processor(tmp_path / "ours")
    measured = processor.measure(ITEMS, processor.preset.choose())
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    for item, expected in zip(ITEMS, measured, strict=True):
        parts = (
            item if isinstance(item, dict) else {"text" if isinstance(item, str) else "image": item}
        )
        content = [{"type": kind, kind: value} for kind, value in parts.items()]
        string = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False
        )
        assert tokenizer(string)["input_ids"] == expected.ids  # as a processor calls it
    settings = json.loads((folder / "processor_config.json").read_text())
    Qwen2VLImageProcessorPil(**settings["image_processor"])
    E5V.from_pretrained(folder, preset="qwen3-vl-embedding")  # the file is one that we follow
    assert "resizes images" not in capsys.readouterr().out
    size = {"shortest_edge": 4096, "longest_edge": 9999}  # of the folder: the preset goes before it
    settings["image_processor"]["size"] = size
    (case.folder / "processor_config.json").write_text(json.dumps(settings))
    exported(case.folder, tmp_path / "again", "qwen3-vl-embedding")
    said = "resizes images to 4096 to 9999 pixels, as the folder's image processor says, where here"
    assert f"{said} they have 4096 to 1843200" in capsys.readouterr().out


def test_presets_of_which_images_would_differ(
    llava: Callable[[str], Case], tmp_path: Path, capsys: Any
) -> None:
    """transformers does not resize twice, number tokens 1-D, or pool an image's tokens alone."""
    refused = set()
    for name, preset in PRESETS.items():
        try:
            check_steps(preset)
        except ValueError as error:
            assert str(error).startswith(f"the preset {name} ")
            refused.add(name)
    assert refused == {
        *("vlm2vec-llava-next", "bge-vl-mllm"),
        *("gme-qwen2-vl", "vlm2vec-v2.0", "lamra-ret", "unite-qwen2-vl"),
        *("jina-embeddings-v4", "jina-embeddings-v4-code", "jina-embeddings-v4-text-matching"),
    }
    folder = exported(llava("llama-gqa").folder, tmp_path, "bge-vl-mllm")
    assert "nothing for sentence-transformers: the preset bge-vl-mllm" in capsys.readouterr().out
    assert not (folder / "modules.json").exists()


def test_what_cannot_be_told_is_refused(llava: Callable[[str], Case], tmp_path: Path) -> None:
    theirs = SentenceTransformer(str(exported(llava("llama-gqa").folder, tmp_path)), device="cpu")
    with pytest.raises(Exception, match="at most one image"):
        theirs.encode([{"image": [picture(30, 30), picture(30, 40)]}])
