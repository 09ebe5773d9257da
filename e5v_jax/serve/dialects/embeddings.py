"""Which dialect a body of ``/v1/embeddings`` is in: four share the route."""

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from e5v_jax.serve.dialects import infinity, jina, openai, vllm


def choose(body: Mapping[str, Any]) -> ModuleType:
    """The module whose ``parse`` and ``error`` are for it; OpenAI's where nothing tells."""
    if "messages" in body:
        return vllm
    if "modality" in body:
        return infinity
    given = body.get("input")
    items = given if isinstance(given, list) else [given]
    if body.keys() & jina.FIELDS or any(isinstance(item, Mapping) for item in items):
        return jina
    return openai
