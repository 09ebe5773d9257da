"""The image processors of Qwen2-VL's kin: their files, their limits, thin images."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hf_models import picture
from PIL import Image
from qwen2_models import OldCase
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from e5v_jax import E5V
from e5v_jax.checkpoints.from_hf import Args, convert
from e5v_jax.checkpoints.hf_source import open_source
from e5v_jax.families.qwen_vl import QWEN_VL
from e5v_jax.families.qwen_vl.patches import cut_patches
from e5v_jax.families.qwen_vl.processor import OLD_PATCH_BUCKETS
from e5v_jax.families.qwen_vl.resize import smart_resize
from e5v_jax.nn.config import UnsupportedModelError
from e5v_jax.presets import PRESETS


def test_image_processors(qwen2: Callable[[str], OldCase]) -> None:
    """CLIP's mean and deviation, also where the file leaves them out."""
    config = qwen2("qwen2").e5v.config
    settings: dict[str, Any] = {
        "min_pixels": 3136,
        "max_pixels": 12845056,
        "patch_size": 4,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "processor_class": "Qwen2VLProcessor",
        "image_processor_type": "Qwen2VLImageProcessor",
    }
    config = QWEN_VL.match_preprocessor(config, settings)
    assert (config.min_pixels, config.max_pixels) == (3136, 12845056)
    QWEN_VL.check_preprocessor(config, settings)
    mean = [0.48145466, 0.4578275, 0.40821073]
    QWEN_VL.check_preprocessor(config, {**settings, "image_mean": mean})
    with pytest.raises(UnsupportedModelError, match="image_mean is"):
        QWEN_VL.check_preprocessor(config, {**settings, "image_mean": [0.5] * 3})


def with_files(case: OldCase, folder: Path, files: dict[str, Any]) -> Path:
    """The model of ``case`` with other files of an image processor."""
    folder.mkdir()
    for file in case.folder.iterdir():
        (folder / file.name).symlink_to(file)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


SETTINGS = {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 4}
SIZE = {"shortest_edge": 700, "longest_edge": 9000}
SPELLINGS: dict[str, dict[str, Any]] = {
    "size": {"size": SIZE},
    "pixels": {"min_pixels": 700, "max_pixels": 9000},
    "both": {
        "size": {"shortest_edge": 1, "longest_edge": 2},
        "min_pixels": 700,
        "max_pixels": 9000,
    },
    "one": {"size": SIZE, "min_pixels": 900, "max_pixels": None},
    "half": {"max_pixels": 5000},  # the other is that of the class
    "none": {},
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_limits_are_those_of_the_folder(
    spelling: str, qwen2: Callable[[str], OldCase], tmp_path: Path
) -> None:
    """As transformers' processor has them, in each of its two files; converted, they stay."""
    case, settings = qwen2("qwen2"), {**SETTINGS, **SPELLINGS[spelling]}
    theirs = Qwen2VLImageProcessorPil(**json.loads(json.dumps(settings)))
    sizes = [(10, 12), (20, 33), (50, 81), (300, 100), (99, 98), (320, 340)]
    expected = [theirs.get_number_of_image_patches(*size) // 4 for size in sizes]
    first = with_files(case, tmp_path / "4", {"preprocessor_config": settings})
    second = {"image_processor": settings, "processor_class": "Qwen2VLProcessor"}
    folders = [first, with_files(case, tmp_path / "5", {"processor_config": second})]
    if spelling == "one":
        convert(Args(src=str(first), dst=tmp_path / "converted"))
        (tmp_path / "without").mkdir()
        for file in (tmp_path / "converted").iterdir():
            if file.name != "preprocessor_config.json":
                (tmp_path / "without" / file.name).symlink_to(file)
        folders += [tmp_path / "converted", tmp_path / "without"]
    for folder in folders:
        processor = E5V.load_processor(folder)
        assert [processor.measure_image(size)[0] for size in sizes] == expected, folder


def test_what_goes_before_the_limits_of_the_folder(
    qwen2: Callable[[str], OldCase], tmp_path: Path
) -> None:
    """An option, then a preset that states its own; each limit alone."""
    settings = {**SETTINGS, "min_pixels": 64 * 20, "max_pixels": 64 * 100}
    folder = with_files(qwen2("qwen2"), tmp_path / "a", {"preprocessor_config": settings})

    def tokens(side: int, **options: Any) -> int:
        processor = E5V.load_processor(folder, **options)
        found: int = processor.measure_image((side, side))[0]
        return found

    assert (tokens(8), tokens(400)) == (25, 100)
    assert (tokens(8, min_pixels=64 * 36), tokens(400, min_pixels=64 * 36)) == (36, 100)
    assert (tokens(8, max_pixels=64 * 49), tokens(400, max_pixels=64 * 49)) == (25, 49)
    assert (tokens(30, preset="vlm2vec-v2.0"), tokens(200, preset="vlm2vec-v2.0")) == (49, 625)
    with pytest.raises(ValueError, match=r"^min_pixels 9000: expected at most max_pixels, 6400$"):
        tokens(8, min_pixels=9000)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"preprocessor_config": {"min_pixels": 0}},
            "min_pixels is 0: expected a number of pixels",
        ),
        ({"preprocessor_config": {"max_pixels": 64.0}}, "max_pixels is 64.0: expected a number"),
        ({"preprocessor_config": {"max_pixels": True}}, "max_pixels is True: expected a number"),
        ({"preprocessor_config": {"size": 224}}, "size is 224: expected an object"),
        (
            {"preprocessor_config": {"size": {"shortest_edge": 9}}},
            "size.longest_edge is None: expected a number of pixels",
        ),
        (
            {"preprocessor_config": {"size": {"min_pixels": 9, "max_pixels": 99}}},
            "size.shortest_edge is None: expected a number of pixels",
        ),
        (
            {"preprocessor_config": {"size": SIZE, "max_pixels": 600}},
            "size.shortest_edge is 700: expected at most max_pixels, 600",
        ),
        (
            {"preprocessor_config": {"size": SIZE}, "processor_config": {"image_processor": {}}},
            "size, min_pixels and max_pixels say 700 to 9000 pixels, where the folder's other file "
            "or its conversion has 3136 to 1003520",
        ),
    ],
)
def test_limits_that_cannot_be(
    files: dict[str, dict[str, Any]], message: str, qwen2: Callable[[str], OldCase], tmp_path: Path
) -> None:
    """One line that names file and key."""
    full = {
        name: {"image_processor": SETTINGS} if name == "processor_config" else {**SETTINGS, **given}
        for name, given in files.items()
    }
    folder = with_files(qwen2("qwen2"), tmp_path / "a", full)
    with pytest.raises(UnsupportedModelError) as error:
        open_source(folder)
    assert str(error.value).startswith(f"{folder}/preprocessor_config.json: {message}")
    assert "\n" not in str(error.value)


def test_limits_of_an_image(qwen2: Callable[[str], OldCase]) -> None:
    """As transformers has them, unless the folder, a preset or the caller says otherwise."""
    case = qwen2("qwen2")
    assert E5V.load_processor(case.folder).measure_image((800, 800)) == (35**2, 5120)
    processor = E5V.load_processor(case.folder, max_pixels=10**6)
    most = OLD_PATCH_BUCKETS[-1]
    with pytest.raises(ValueError, match=rf"would have 40000 patches, at most {most}"):
        processor.measure_image((800, 800))


def test_vlm2vec_makes_thin_images_square(qwen2: Callable[[str], OldCase], tmp_path: Path) -> None:
    """Those with a side under 28 become 56 x 56, as its authors' code says it; byte for byte."""
    case, preset = qwen2("qwen2"), PRESETS["vlm2vec-v2.0"]
    processor = E5V.load_processor(case.folder, preset=preset.name)
    limits = {"factor": 8, "min_pixels": preset.min_pixels, "max_pixels": preset.max_pixels}
    for size in [(27, 150), (150, 27), (4, 900), (27, 27), (28, 28), (28, 61)]:
        picture(*size).quantize(30).save(tmp_path / "a.png")  # a palette: filters differ
        image = Image.open(tmp_path / "a.png")
        if image.size[0] < 28 or image.size[1] < 28:
            image = image.resize((56, 56))
        image = image.convert("RGB")
        resized = smart_resize((image.height, image.width), **limits)
        (item,) = processor.measure([tmp_path / "a.png"], preset.choose())
        expected = cut_patches(image, resized, patch=4, merge=2, window=0)
        np.testing.assert_array_equal(processor.load(item).image.pixels, expected.pixels)
        assert item.length == len(expected.pixels) // 4 + len(item.ids) - 1
    assert (resized, len(expected.pixels)) == ((40, 88), 220)
