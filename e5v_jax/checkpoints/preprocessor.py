"""The settings of image processors in a model folder: followed, or what is computed here."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from e5v_jax.checkpoints.json_file import read_json
from e5v_jax.families.base import Family, ModelConfig
from e5v_jax.nn.config import UnsupportedModelError

FILES = ("preprocessor_config.json", "processor_config.json")
_KEY = "image_processor_type"  # says that settings are an image processor's, whose defaults count


def match_preprocessor(folder: Path, family: Family, config: ModelConfig) -> ModelConfig:
    """``config`` with what the image processor in ``folder`` says of the model.

    Raises as :func:`check_preprocessor`, which the rest of it passes.
    """
    for file, settings in read_settings(folder):
        if _KEY in settings:
            try:
                config = family.match_preprocessor(config, settings)
            except ValueError as error:
                raise UnsupportedModelError(f"{file}: {error}") from error
    check_preprocessor(folder, family, config)
    return config


def check_preprocessor(folder: Path, family: Family, config: ModelConfig) -> None:
    """Refuse an image processor in ``folder`` that does something else than is computed here.

    transformers 4 writes its settings to preprocessor_config.json, transformers 5 to the
    ``image_processor`` of processor_config.json, beside the processor's own. Each must say what is
    computed, so that it does not matter which of two is followed.

    Raises:
        UnsupportedModelError: names file and setting.
        ValueError: a file that is no JSON object.
    """
    for file, settings in read_settings(folder):
        try:
            family.check_preprocessor(config, settings)
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"{file}: {error}") from error


def read_settings(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Each group of settings with its file."""
    for name in FILES:
        if not (file := folder / name).exists():
            continue
        settings: dict[str, Any] = read_json(file)
        if name == FILES[1]:
            images = settings.pop("image_processor", None)
            yield file, settings
            if images is None:
                continue
            if not isinstance(images, dict):
                raise UnsupportedModelError(f"{file}: image_processor is {images!r}: not an object")
            settings = images
        yield file, {_KEY: None, **settings}
