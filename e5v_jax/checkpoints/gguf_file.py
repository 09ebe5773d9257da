"""An open GGUF file: metadata and tensor table, and what is wrong with a damaged one."""

from functools import lru_cache
from pathlib import Path
from typing import Any

from gguf import GGUFReader

from e5v_jax.nn.config import UnsupportedModelError


class GGUFError(ValueError):
    """The file is not a whole, well-formed GGUF file; the message names it and says what to do."""


class GGUFFile(GGUFReader):
    """An open GGUF file: metadata and tensor table parsed, tensor data untouched."""

    path: Path

    def get(self, key: str) -> Any:
        """The value of a metadata key (scalar, str or list), or None when the file lacks it."""
        field = self.get_field(key)
        return None if field is None else field.contents()

    def require(self, key: str) -> Any:
        """The value of a metadata key; a missing one raises :class:`GGUFError` naming it."""
        value = self.get(key)
        if value is None:
            raise GGUFError(
                f"{self.path}: no metadata key {key!r}, which cannot be guessed; convert the model "
                "to GGUF again with a current llama.cpp, or convert its Hugging Face folder instead"
            )
        return value


def open_gguf(path: str | Path) -> GGUFFile:
    """Parse a GGUF file's metadata; the last one is cached.

    Raises:
        FileNotFoundError: no such file.
        GGUFError: not GGUF, cut short or damaged.
        UnsupportedModelError: the other byte order, or one part of several.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    stat = path.stat()
    return _parse(path, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=1)  # the vocabulary takes seconds to parse, and one conversion asks three times
def _parse(path: Path, _mtime_ns: int, _size: int) -> GGUFFile:
    with path.open("rb") as start:
        magic = start.read(4)
    if magic != b"GGUF":
        raise GGUFError(f"{path}: not a GGUF file (it starts with {magic!r}, expected b'GGUF')")
    try:
        file = GGUFFile(path)
    except (ValueError, IndexError, KeyError) as error:
        raise unreadable(path, str(error)) from error
    if file.byte_order == "S":
        raise UnsupportedModelError(
            f"{path}: byte order is not this machine's; convert it with gguf's gguf-convert-endian"
        )
    if (parts := file.get("split.count") or 1) > 1:
        raise UnsupportedModelError(
            f"{path}: one part of {parts} (split.count); join them first with "
            "llama-gguf-split --merge"
        )
    file.path = path
    return file


def unreadable(path: Path, detail: str) -> GGUFError:
    """The error for a file whose contents cannot be read, with the cause ``detail``."""
    return GGUFError(
        f"{path}: cannot be read as GGUF ({detail}); it is cut short or damaged: fetch it again"
    )
