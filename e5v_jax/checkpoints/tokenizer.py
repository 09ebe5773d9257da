"""The tokenizer of a model folder."""

import tempfile
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from e5v_jax.checkpoints.json_file import read_json
from e5v_jax.checksums import CHECKSUMS, verify_checksums
from e5v_jax.storage import copy_file, in_bucket

if TYPE_CHECKING:  # which takes a second
    from transformers import PreTrainedTokenizerFast

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


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerFast":
    """The tokenizer of a model folder or GGUF file.

    Raises FileNotFoundError: there is none; ValueError: it cannot be read, or is a slow one.
    """
    if folder.is_file():
        from e5v_jax.checkpoints.gguf_tokenizer import build_tokenizer  # takes 0.4 s

        return build_tokenizer(folder)
    if not any((folder / name).is_file() for name in TOKENIZER_FILES[:2]):
        raise FileNotFoundError(
            f"{folder}: no tokenizer.json or tokenizer.model: put the tokenizer of the model there"
        )
    if in_bucket(folder):  # transformers reads files of this machine only
        with tempfile.TemporaryDirectory() as local:
            copy_named(folder, Path(local), (*TOKENIZER_FILES, CHECKSUMS))
            verify_checksums(Path(local), only=TOKENIZER_FILES)  # a copy may be damaged
            return load_tokenizer(Path(local))
    settings: dict[str, Any] = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        if (folder / name).exists():
            settings = {**read_json(folder / name), **settings}  # the first says most
    if any("\ud800" <= c <= "\udfff" for c in str(folder)):  # tokenizers takes no such path
        raise ValueError(f"{str(folder)!a}: the folder's name is not UTF-8: rename it")
    try:
        return _load(folder, settings)
    except Exception as error:  # transformers and tokenizers raise many types
        reason = textwrap.shorten(str(error) or type(error).__name__, 200)
        what = "tokenizer.json" if (folder / "tokenizer.json").is_file() else "tokenizer.model"
        raise ValueError(
            f"{folder / what}: damaged, or no tokenizer of transformers ({reason}); fetch it and "
            "the other tokenizer files again"
        ) from error


def _load(folder: Path, settings: dict[str, Any]) -> "PreTrainedTokenizerFast":
    from transformers import PreTrainedTokenizerFast

    # Said here, or transformers warns of a pattern that Mistral's tokenizers of 2025 have, and that
    # it leaves as it is unless the folder's settings say otherwise.
    pattern = {"fix_mistral_regex": settings.get("fix_mistral_regex", False)}
    # these classes (of transformers 4 and 5) take tokenizer.json as it is; others may change it
    as_it_is = settings.get("tokenizer_class") in ("PreTrainedTokenizerFast", "TokenizersBackend")
    if as_it_is and (folder / "tokenizer.json").is_file():
        return PreTrainedTokenizerFast.from_pretrained(folder, **pattern)
    from transformers import AutoTokenizer  # imports torch where it is installed: 2 s, 200 MB

    tokenizer = AutoTokenizer.from_pretrained(folder, **pattern)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError("only fast tokenizers are supported")
    return tokenizer
