"""Settings of image processors in a model folder: those we compute are taken, others refused."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hf_models import Case, picture
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)

from e5v_jax import E5V
from e5v_jax.checkpoints import to_hf
from e5v_jax.checkpoints.converted import ConvertedFolder
from e5v_jax.checkpoints.from_hf import Args, convert
from e5v_jax.checkpoints.preprocessor import check_preprocessor as check_folder
from e5v_jax.families.llava_next import LLAVA_NEXT
from e5v_jax.families.llava_next.preprocessor import check_preprocessor
from e5v_jax.families.llava_next.presets import ARCHITECTURES
from e5v_jax.nn.config import UnsupportedModelError

REAL = ARCHITECTURES["llava-next-mistral-7b"]
# preprocessor_config.json and processor_config.json of llava-hf/llava-v1.6-mistral-7b-hf
PUBLISHED: dict[str, Any] = {
    "aspect_ratio_setting": "anyres",
    "crop_size": {"height": 336, "width": 336},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_pad": True,
    "do_rescale": True,
    "do_resize": True,
    "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_processor_type": "LlavaNextImageProcessor",
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "processor_class": "LlavaNextProcessor",
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"shortest_edge": 336},
}
PROCESSOR = {
    "image_token": "<image>",
    "patch_size": 14,
    "processor_class": "LlavaNextProcessor",
    "vision_feature_select_strategy": "default",
    "num_additional_image_tokens": 1,
}
# of OpenAI's tower, which the original LLaVA code's checkpoints carry
ORIGINAL = {
    "crop_size": 336,
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "size": 336,
}
CHANGES: dict[str, Any] = {
    "aspect_ratio_setting": "pad",
    "crop_size": {"height": 224, "width": 224},
    "do_convert_rgb": False,
    "do_normalize": False,
    "do_rescale": False,
    "do_resize": False,
    "image_grid_pinpoints": [[336, 672], [672, 336]],
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "resample": 2,
    "rescale_factor": 1 / 127.5,
    "size": {"shortest_edge": 224},
    "sharpen": 2,
}
# Of other types or lengths, or no numbers: not what is computed, whatever transformers makes of it.
ODD: list[tuple[str, Any]] = [
    ("resample", "3"),
    ("resample", None),
    ("rescale_factor", "1/255"),
    ("rescale_factor", float("nan")),
    ("do_normalize", None),
    ("do_normalize", "true"),
    ("do_rescale", 0),
    ("image_mean", [0.48145466, 0.4578275]),
    ("image_mean", 0.48145466),
    ("image_std", [float("nan")] * 3),
    ("image_std", None),
    ("size", [336, 336]),
    ("size", {"shortest_edge": "336"}),
    ("size", {"longest_edge": 336}),
    ("size", None),
    ("image_grid_pinpoints", []),
    ("image_grid_pinpoints", None),
    ("image_processor_type", "SiglipImageProcessor"),
]


@pytest.mark.parametrize("settings", [PUBLISHED, PROCESSOR, ORIGINAL, {}])
def test_published_files_are_taken(settings: dict[str, Any]) -> None:
    check_preprocessor(REAL, settings)


@pytest.mark.parametrize("name", CHANGES)
def test_another_setting_is_refused_by_name(name: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"^{name} is "):
        check_preprocessor(REAL, {**PUBLISHED, name: CHANGES[name]})


@pytest.mark.parametrize(("name", "value"), ODD)
@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json"])
def test_what_no_processor_says_is_refused(
    file: str, name: str, value: Any, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {**PUBLISHED, name: value}
    if file == "processor_config.json":
        settings = {**PROCESSOR, "image_processor": settings}
    (tmp_path / file).write_text(json.dumps(settings))
    with pytest.raises(UnsupportedModelError, match=f"^{tmp_path}/{file}: {name} is "):
        check_folder(tmp_path, LLAVA_NEXT, REAL)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"image_processor": [1]}, r"image_processor is \[1\]: not an object"),
        ({**PROCESSOR, "patch_size": 16}, "patch_size is 16"),
        ({"image_mean": [0.5] * 3, "image_processor": PUBLISHED}, "image_mean is "),
        ({"image_processor": {}}, "size is 224"),  # the default of transformers
    ],
)
def test_around_an_image_processor(settings: dict[str, Any], expected: str, tmp_path: Path) -> None:
    """What stands around one counts too, also where both say something."""
    (tmp_path / "processor_config.json").write_text(json.dumps(settings))
    with pytest.raises(UnsupportedModelError, match=expected):
        check_folder(tmp_path, LLAVA_NEXT, REAL)


def test_missing_pinpoints_are_the_default_of_transformers(tmp_path: Path) -> None:
    """Which are those of most checkpoints; CLIP's processor, which the original code has, none."""
    other = dataclasses.replace(REAL, image_grid_pinpoints=((336, 672),))
    settings = {key: value for key, value in PUBLISHED.items() if key != "image_grid_pinpoints"}
    check_preprocessor(REAL, settings)
    check_preprocessor(other, ORIGINAL)
    with pytest.raises(UnsupportedModelError, match=r"^image_grid_pinpoints is "):
        check_preprocessor(other, settings)


@pytest.mark.parametrize("name", ["size", "crop_size"])
def test_a_missing_size_is_the_default_of_transformers(name: str) -> None:
    """Which is 224, not the tower's."""
    settings = {key: value for key, value in PUBLISHED.items() if key != name}
    with pytest.raises(UnsupportedModelError, match=f"^{name} is .*224"):
        check_preprocessor(REAL, settings)


@pytest.mark.parametrize("changes", [{"do_center_crop": False}, {"do_pad": False}])
def test_what_is_taken_makes_no_difference_to_transformers(changes: dict[str, Any]) -> None:
    image = picture(70, 45)
    sizes: dict[str, Any] = {
        "size": {"shortest_edge": 28},
        "crop_size": {"height": 28, "width": 28},
        "image_grid_pinpoints": [[28, 56], [56, 28]],
    }
    plain, changed = (
        LlavaNextImageProcessorPil(**sizes, **x)(image)["pixel_values"][0] for x in ({}, changes)
    )
    np.testing.assert_array_equal(plain, changed)
    check_preprocessor(REAL, {**PUBLISHED, **changes})


@pytest.mark.parametrize("whole", [False, True], ids=["image processor", "processor"])
def test_what_transformers_saves_is_taken(
    whole: bool, llava: Callable[[str], Case], tmp_path: Path
) -> None:
    """And another mean there is refused: at conversion, and of a folder converted before."""
    case = llava("llama-gqa")
    for file in case.folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (case.processor if whole else case.processor.image_processor).save_pretrained(tmp_path)
    name = "processor_config.json" if whole else "preprocessor_config.json"
    out = tmp_path / "out"
    convert(Args(str(tmp_path), out))
    E5V.from_pretrained(out, dtype="float32")
    for folder in (tmp_path, out):
        settings = json.loads((folder / name).read_text())
        (settings["image_processor"] if whole else settings)["image_mean"] = [0.5, 0.5, 0.5]
        (folder / name).write_text(json.dumps(settings))
        with pytest.raises(UnsupportedModelError, match=rf"{name}: image_mean is \[0.5, 0.5"):
            E5V.from_pretrained(folder, dtype="float32")
    with pytest.raises(UnsupportedModelError, match=rf"{name}: image_mean is \[0.5, 0.5"):
        ConvertedFolder(out)  # which training, evaluation and dry runs open
    to_hf.convert(to_hf.Args(out, tmp_path / "back"))  # the way out of such a folder
    assert (tmp_path / "back" / name).read_bytes() == (out / name).read_bytes()
    with pytest.raises(UnsupportedModelError, match=rf"{name}: image_mean is \[0.5, 0.5"):
        convert(Args(str(tmp_path), tmp_path / "again"))
