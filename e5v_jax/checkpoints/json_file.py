"""JSON objects in files that others wrote: whatever is wrong with one is said in a line."""

import json
from pathlib import Path
from typing import Any

_DEEPEST = 100  # levels; what reads a deeper object is recursive, and would fail somewhere else


def read_json(file: Path, *, todo: str = "fetch it again") -> dict[str, Any]:
    """Read a JSON object. ``todo`` is the advice for a file that is damaged.

    Raises:
        FileNotFoundError: no such file, or a folder or pipe has its name.
        PermissionError: it cannot be read.
        ValueError: not JSON, not an object, or nested too deeply.
    """
    if not file.is_file():  # opening a pipe would wait for ever
        raise FileNotFoundError(f"{file}: {'not a file' if file.exists() else 'missing'}")
    try:
        content = json.loads(file.read_text("utf-8"))
    except RecursionError as error:
        raise ValueError(f"{file}: damaged, JSON nested too deeply; {todo}") from error
    except ValueError as error:  # of JSON or of UTF-8
        raise ValueError(f"{file}: damaged, not JSON ({error}); {todo}") from error
    if not isinstance(content, dict):
        found = type(content).__name__
        raise ValueError(f"{file}: damaged, expected a JSON object, found a {found}; {todo}")
    if _is_deep(content):
        raise ValueError(f"{file}: damaged, JSON nested more than {_DEEPEST} levels deep; {todo}")
    return content


def _is_deep(content: Any) -> bool:
    level = [content]
    for _ in range(_DEEPEST):
        parts = [x.values() if isinstance(x, dict) else x for x in level]
        level = [x for part in parts for x in part if isinstance(x, dict | list)]
    return bool(level)
