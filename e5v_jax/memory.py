"""Memory of the host that glibc keeps though nobody uses it."""

import ctypes
import sys


def release_freed_memory() -> None:
    """Give the system what loading or compiling has freed, which glibc would keep for later.

    That is 80 to 140 MB beside a small model. Where the C library is another one, nothing is done.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
