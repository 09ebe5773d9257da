"""The settings of image processors in a model folder, which must be what is computed here."""

from pathlib import Path
from typing import Any

from e5v_jax.checkpoints.json_file import read_json
from e5v_jax.families.base import Family, ModelConfig
from e5v_jax.nn.config import UnsupportedModelError

FILES = ("preprocessor_config.json", "processor_config.json")


def check_preprocessor(folder: Path, family: Family, config: ModelConfig) -> None:
    """Refuse an image processor in ``folder`` that does something else than is computed here.

    transformers 4 writes its settings to preprocessor_config.json, transformers 5 to the
    ``image_processor`` of processor_config.json, beside the processor's own. Each must say what is
    computed, so that it does not matter which of two is followed.

    Raises:
        UnsupportedModelError: names file and setting.
        ValueError: a file that is no JSON object.
    """
    for name in FILES:
        if not (file := folder / name).exists():
            continue
        settings: dict[str, Any] = read_json(file)
        try:
            if name == FILES[1]:
                images = settings.pop("image_processor", None)
                family.check_preprocessor(config, settings)
                if images is None:
                    continue
                if not isinstance(images, dict):
                    raise UnsupportedModelError(f"image_processor is {images!r}: not an object")
                settings = images
            # the key says that these are an image processor's, whose defaults count
            family.check_preprocessor(config, {"image_processor_type": None, **settings})
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"{file}: {error}") from error
