"""A vision tower on its own, of a Hugging Face folder or an ONNX file, as LLaVA-NeXT takes one."""

import dataclasses
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from e5v_jax.checkpoints.finite import check_finite
from e5v_jax.checkpoints.hf_source import Tensors
from e5v_jax.checkpoints.json_file import read_json
from e5v_jax.checkpoints.names import map_keys
from e5v_jax.checkpoints.onnx_tower import OnnxTower
from e5v_jax.checkpoints.preprocessor import read_settings
from e5v_jax.checkpoints.safetensors_file import SafetensorsFolder
from e5v_jax.families.settings import check_settings
from e5v_jax.nn.config import UnsupportedModelError, transformers_config
from e5v_jax.nn.parameters import ParameterTable, Section, Slot
from e5v_jax.nn.vision_config import CLIP, DINOV2, IMAGE_MEAN, IMAGE_STD, SIGLIP, VisionConfig
from e5v_jax.nn.vision_tower import tower_parameters
from e5v_jax.storage import in_bucket

# What each kind was trained with: mean and deviation of pixels from 0 to 1.
_STANDARD: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    CLIP: (IMAGE_MEAN, IMAGE_STD),
    SIGLIP: ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    DINOV2: ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # ImageNet's
}
_WITH_TEXT = {"clip": CLIP, "siglip": SIGLIP}
_SECTIONS = {
    CLIP: Section(("vision_model.", ""), ("embeddings.class_embedding",), "vision_model."),
    SIGLIP: Section(("vision_model.", ""), ("embeddings.patch_embedding.weight",), "vision_model."),
    DINOV2: Section(("dinov2.", ""), ("embeddings.cls_token",), ""),
}
_IGNORED_KEYS = {
    r"text_model\..*": "the half of CLIP and SigLIP that embeds texts",
    r"(text|visual)_projection\.weight|logit_(scale|bias)": "the space of both halves",
    r"classifier\.(weight|bias)": "the head of a classifier, behind all features",
}
_SETTINGS: dict[str, tuple[Any, ...]] = {
    "do_rescale": (True,),
    "rescale_factor": (1 / 255,),
    "do_normalize": (True,),
    "do_convert_rgb": (True, None),
}
_IGNORED_SETTINGS = {
    **dict.fromkeys(
        ("size", "crop_size", "do_resize", "do_center_crop", "resample", "do_pad"),
        "the tower gets LLaVA-NeXT's tiles, which are cut to its size in one way",
    ),
    **dict.fromkeys(
        ("image_processor_type", "feature_extractor_type", "processor_class", "_processor_class"),
        "the class is LLaVA-NeXT's",
    ),
    **dict.fromkeys(
        ("data_format", "input_data_format", "return_tensors", "device", "_valid_processor_keys"),
        "how transformers holds its arrays",
    ),
}


@dataclass(frozen=True)
class Tower:
    """A tower's weights, each with its row, and what its files say of it."""

    path: Path
    config: VisionConfig  # with mean and deviation
    raw: dict[str, Any]  # the fields of transformers' configuration
    image_size: int  # for which it was made
    tensors: Tensors
    keys: dict[Slot, str]
    others: tuple[str, ...] = ()  # what else is in its file

    def at(self, image_size: int) -> "Tower":
        """The tower for images of another size, its positions interpolated.

        That is done once, here, as transformers' own towers of all three kinds do it whenever an
        image has another size: bicubic. Raises ValueError: not even one patch.
        """
        config = dataclasses.replace(self.config, image_size=image_size)
        raw = {**self.raw, "image_size": image_size}
        return dataclasses.replace(self, config=config, raw=raw, image_size=image_size)

    def shape(self, slot: Slot) -> tuple[int, ...]:
        """Shape of a tensor, as torch has it."""
        shape = self.tensors.shape(self.keys[slot])
        if not slot.row.name.endswith("position_embedding"):
            return shape
        return (*shape[:-2], self.config.num_positions, shape[-1])

    def read(self, slot: Slot) -> np.ndarray:
        """A tensor, as torch has it. Raises ValueError: a value is NaN or infinite."""
        key = self.keys[slot]
        array = check_finite(self.tensors.read(key), f"{self.path}: {key}")
        if array.shape == (shape := self.shape(slot)):
            return array
        table = array.reshape(array.shape[-2:]).astype(np.float32)  # [positions, D]
        first = int(self.config.has_class_token)
        resized = resize_positions(table[first:], self.config.patches_per_side)
        return np.concatenate([table[:first], resized]).reshape(shape).astype(array.dtype)


def open_tower(path: Path) -> Tower:
    """Open a Hugging Face folder or an ONNX file.

    Raises:
        FileNotFoundError: it, or a file of it, is not there.
        ImportError: as :class:`OnnxTower`.
        UnsupportedModelError: not CLIP, SigLIP or DINOv2, or one that asks for something else.
        ValueError: a damaged file, an unknown, missing or misshapen tensor; names it.
    """
    if in_bucket(path):
        raise ValueError(f"{path}: a tower cannot be read from a bucket; fetch it")
    if path.suffix == ".onnx":
        onnx = OnnxTower(path)
        return _tower(path, path, onnx.config, onnx, onnx.image_size, tuple(sorted(onnx.others)))
    if not path.is_dir():
        raise ValueError(f"{path}: expected the folder of a tower or an .onnx file")
    file = path / "config.json"
    raw = read_json(file)
    if (kind := _WITH_TEXT.get(str(raw.get("model_type")))) is not None:
        raw = {**raw.get("vision_config", {}), "model_type": kind}
    return _tower(path, file, raw, SafetensorsFolder(path))


def _tower(
    path: Path,
    file: Path,
    raw: dict[str, Any],
    tensors: Tensors,
    image_size: int | None = None,
    others: tuple[str, ...] = (),
) -> Tower:
    kind = raw.get("model_type")
    if kind not in _STANDARD:
        kinds = ", ".join((*_WITH_TEXT, *_STANDARD))
        raise UnsupportedModelError(f"{file}: model_type {kind!r}: expected a tower of {kinds}")
    try:
        config = VisionConfig.from_hf(transformers_config(raw, kind))
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{file}: {error}") from error
    except Exception as error:  # transformers' configuration classes raise many types
        reason = textwrap.shorten(str(error), 200)
        raise ValueError(f"{file}: not a valid configuration: {reason}") from error
    config = _with_pixels(path, config)
    rows = tuple(tower_parameters(config, config.num_hidden_layers))
    table = ParameterTable(rows, {"vision": _SECTIONS[kind]}, (), ignored=_IGNORED_KEYS)
    try:
        keys = {slot: key for key, slot in map_keys(tensors.keys(), table).items()}
        for slot, key in keys.items():
            tensors.dtype(key)
            found, expected = list(tensors.shape(key)), list(slot.row.hf_shape)
            if found != expected:
                raise ValueError(f"{key}: shape {found}, the configuration asks for {expected}")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    size = config.image_size
    return Tower(path, config, raw, size, tensors, keys, others).at(image_size or size)


def _with_pixels(path: Path, config: VisionConfig) -> VisionConfig:
    """``config`` with the mean and deviation of the image processor's file, else of its kind."""
    mean, std = _STANDARD[config.model_type]
    found = dict(_pixels(path, config.model_type)) if path.is_dir() else {}
    if len(set(found.values())) > 1:
        raise UnsupportedModelError(
            f"{max(found)}: its mean and deviation differ from {min(found)}"
        )
    for file, (mean, std) in found.items():
        try:
            return dataclasses.replace(config, image_mean=mean, image_std=std)
        except ValueError as error:
            raise UnsupportedModelError(f"{file}: {error}") from error
    return dataclasses.replace(config, image_mean=mean, image_std=std)


def _pixels(path: Path, kind: str) -> Iterator[tuple[Path, tuple[Any, Any]]]:
    """The mean and deviation that each file with an image processor's settings says."""
    standard = dict(zip(("image_mean", "image_std"), map(list, _STANDARD[kind]), strict=True))
    for file, settings in read_settings(path):
        if "image_processor_type" not in settings:  # those of the processor around it
            continue
        given = {name: settings.pop(name, value) for name, value in standard.items()}
        if kind == CLIP:  # LLaVA-NeXT's has no other
            settings |= given
            given = standard
        supported = _SETTINGS | {name: (value,) for name, value in standard.items()}
        try:
            check_settings(settings, supported, _IGNORED_SETTINGS)
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"{file}: {error}") from error
        mean, std = (tuple(x) if isinstance(x, list) else x for x in given.values())
        yield file, (mean, std)


def resize_positions(table: np.ndarray, side: int) -> np.ndarray:
    """Positions of a square of patches, fp32 [N, D], for one of ``side`` patches, [side**2, D].

    As ``torch.nn.functional.interpolate(mode="bicubic", align_corners=False)``.
    """
    old = round(len(table) ** 0.5)
    weights = _cubic(old, side)  # [side, old]
    grid = table.reshape(old, old, -1).astype(np.float64)
    grid = np.einsum("yr,xc,rcd->yxd", weights, weights, grid, optimize=True)
    return grid.reshape(side * side, -1).astype(np.float32)


def _cubic(old: int, new: int) -> np.ndarray:
    """The matrix [new, old] of cubic convolution (a = -0.75), pixels at the edge repeated."""
    a, weights = -0.75, np.zeros((new, old))
    place = (np.arange(new) + 0.5) * old / new - 0.5
    start = np.floor(place).astype(int)
    for tap in range(-1, 3):
        x = np.abs(place - start - tap)
        near = ((a + 2) * x - (a + 3)) * x * x + 1
        far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
        np.add.at(
            weights,
            (np.arange(new), np.clip(start + tap, 0, old - 1)),
            np.where(x <= 1, near, far),
        )
    return weights
