"""The persistent compilation cache: a shape compiled once is read from disk in later runs."""

import hashlib
import os
import platform
from pathlib import Path

import jax

VARIABLE = "E5V_COMPILATION_CACHE"
"""Environment variable: another folder, or ``off``."""


def use_compilation_cache() -> Path | None:
    """Switch JAX's cache on, unless it has a folder already, and return that folder.

    It is ``e5v_jax/xla-...`` in the user's cache folder (``XDG_CACHE_HOME``, else ``~/.cache``);
    ``E5V_COMPILATION_CACHE`` names another or says ``off``, JAX_COMPILATION_CACHE_DIR wins.
    """
    current: str | None = jax.config.values["jax_compilation_cache_dir"]
    if current is not None:
        return Path(current)
    chosen = os.environ.get(VARIABLE)
    if chosen == "off":
        return None
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    # XLA compiles for this very processor; a home folder may be shared with others
    folder = Path(chosen) if chosen else caches / "e5v_jax" / f"xla-{_processor()}"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return folder


def _processor() -> str:
    """A short name for what this machine's processor can do."""
    described = platform.machine() + platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text().splitlines()
        described += next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return hashlib.sha256(described.encode()).hexdigest()[:8]
