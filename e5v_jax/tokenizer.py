"""The tokenizer of a model folder, and its ``<image>`` token."""

import dataclasses
import json
import tempfile
from pathlib import Path

from transformers import AddedToken, PreTrainedTokenizerFast

from e5v_jax.config import ModelConfig
from e5v_jax.converted import TOKENIZER_FILES
from e5v_jax.prompts import IMAGE_PLACEHOLDER
from e5v_jax.storage import copy_file, in_bucket

# Classes (of transformers 4 and 5) that take tokenizer.json as it is; others may change it.
_AS_IN_TOKENIZER_JSON = ("PreTrainedTokenizerFast", "TokenizersBackend")


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a converted or Hugging Face folder, or of a GGUF file.

    Raises:
        FileNotFoundError: the folder has no tokenizer files.
    """
    if folder.is_file():
        from convert.gguf_tokenizer import build_tokenizer  # convert imports this module

        return build_tokenizer(folder)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise FileNotFoundError(f"{folder}: no tokenizer.json or tokenizer.model")
    if in_bucket(folder):  # transformers reads files of this machine only
        with tempfile.TemporaryDirectory() as local:
            for name in filter(lambda name: (folder / name).is_file(), TOKENIZER_FILES):
                copy_file(folder / name, Path(local, name))
            return load_tokenizer(Path(local))
    settings_file = folder / "tokenizer_config.json"
    settings = json.loads(settings_file.read_text()) if settings_file.is_file() else {}
    as_it_is = settings.get("tokenizer_class") in _AS_IN_TOKENIZER_JSON
    if as_it_is and (folder / "tokenizer.json").is_file():
        return PreTrainedTokenizerFast.from_pretrained(folder)
    from transformers import AutoTokenizer  # imports torch where it is installed: 2 s, 200 MB

    tokenizer = AutoTokenizer.from_pretrained(folder)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"{folder}: only fast tokenizers (tokenizer.json) are supported")
    return tokenizer


def with_image_token(config: ModelConfig, tokenizer: PreTrainedTokenizerFast) -> ModelConfig:
    """``config`` of a model with vision, its ``image_token_id`` the tokenizer's ``<image>``.

    The original LLaVA code tokenises around the image, so its tokenizers do not know ``<image>``.
    Such a one gets it added here; any free id serves, as the row of an image is never read.

    Raises:
        ValueError: the tokenizer has ``<image>`` under another id than the config.
    """
    if config.vision is None:
        return config
    found = tokenizer.added_tokens_encoder.get(IMAGE_PLACEHOLDER)
    if found is None:
        tokenizer.add_tokens([AddedToken(IMAGE_PLACEHOLDER, special=True)], special_tokens=True)
        found = tokenizer.added_tokens_encoder[IMAGE_PLACEHOLDER]
        return dataclasses.replace(config, image_token_id=found)
    if found != config.image_token_id:
        raise ValueError(
            f"{IMAGE_PLACEHOLDER} is token {found} of the tokenizer, but image_token_id in "
            f"config.json is {config.image_token_id}: they belong to different models"
        )
    return config
