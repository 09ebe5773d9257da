"""The tokenizer of a model folder."""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from e5v_jax.checkpoints.gguf_tokenizer import build_tokenizer
from e5v_jax.storage import copy_file, in_bucket

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "generation_config.json",
)


def copy_named(src: Path, dst: Path, names: Sequence[str] = TOKENIZER_FILES) -> None:
    """Copy those of the named files that ``src`` has, here or in a bucket, to ``dst``."""
    for name in names:
        if (src / name).is_file():
            copy_file(src / name, dst / name)


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has a tokenizer, and not weights alone."""
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a model folder or GGUF file. Raises FileNotFoundError: there is none."""
    if folder.is_file():
        return build_tokenizer(folder)
    if not has_tokenizer(folder):
        raise FileNotFoundError(f"{folder}: no tokenizer.json or tokenizer.model")
    if in_bucket(folder):  # transformers reads files of this machine only
        with tempfile.TemporaryDirectory() as local:
            copy_named(folder, Path(local))
            return load_tokenizer(Path(local))
    settings_file = folder / "tokenizer_config.json"
    settings = json.loads(settings_file.read_text()) if settings_file.is_file() else {}
    # these classes (of transformers 4 and 5) take tokenizer.json as it is; others may change it
    as_it_is = settings.get("tokenizer_class") in ("PreTrainedTokenizerFast", "TokenizersBackend")
    if as_it_is and (folder / "tokenizer.json").is_file():
        return PreTrainedTokenizerFast.from_pretrained(folder)
    from transformers import AutoTokenizer  # imports torch where it is installed: 2 s, 200 MB

    tokenizer = AutoTokenizer.from_pretrained(folder)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"{folder}: only fast tokenizers (tokenizer.json) are supported")
    return tokenizer
