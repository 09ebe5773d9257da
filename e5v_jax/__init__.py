"""E5-V in JAX/Flax: universal embeddings of text, images and text+image."""

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from e5v_jax.encode.e5v import E5V

__version__ = "0.1.0"
__all__ = ["E5V", "__version__"]

# transformers says so when it is imported; of it, only tokenizers are used here
logging.getLogger("transformers").addFilter(
    lambda record: not str(record.msg).startswith("PyTorch was not found")
)


def __getattr__(name: str) -> Any:
    """Import :class:`E5V` on first use: it loads JAX, which ``--help`` does not need."""
    if name == "E5V":
        from e5v_jax.encode.e5v import E5V

        return E5V
    raise AttributeError(f"module 'e5v_jax' has no attribute {name!r}")
