"""The persistent compilation cache: a shape compiled once is read from disk in later runs."""

import hashlib
import logging
import os
import platform
import tempfile
from pathlib import Path

import jax

_logger = logging.getLogger("e5v_jax")
_ROOM = 2**20  # bytes that a program may take
VARIABLE = "E5V_COMPILATION_CACHE"  # in the environment: another folder, or "off"


def use_compilation_cache() -> Path | None:
    """Switch JAX's cache on, unless it has a folder already, and return that folder.

    It is ``e5v_jax/xla-...`` in the user's cache folder (``XDG_CACHE_HOME``, else ``~/.cache``);
    ``E5V_COMPILATION_CACHE`` names another or says ``off``, JAX_COMPILATION_CACHE_DIR wins. Where
    nothing can be written a line says so, and there is none.
    """
    current: str | None = jax.config.values["jax_compilation_cache_dir"]
    if current is not None:
        return Path(current)
    chosen = os.environ.get(VARIABLE)
    if chosen == "off":
        return None
    if chosen:
        folder = Path(chosen)
    else:
        # XLA compiles for this very processor; a home folder may be shared with others
        processor = platform.machine() + platform.processor()
        cpuinfo = Path("/proc/cpuinfo")
        lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
        processor += next((line for line in lines if line.startswith(("flags", "Features"))), "")
        name = f"xla-{hashlib.sha256(processor.encode()).hexdigest()[:8]}"
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = caches / "e5v_jax" / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_ROOM))
    except OSError as error:
        reason = error.strerror or str(error)
        _logger.warning(
            "%s: no compilation cache there (%s): every start compiles anew; %s names another "
            "folder, or off",
            folder,
            reason,
            VARIABLE,
        )
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return folder
