"""infinity's extension of OpenAI's embeddings: ``modality`` says what the inputs are."""

from collections.abc import Mapping
from typing import Any, Literal

from e5v_jax.serve.dialects.openai import Options, error
from e5v_jax.serve.dialects.task import ServedModel, Task, check_some, read

__all__ = ["error", "parse"]  # its errors are OpenAI's


class Body(Options, kw_only=True, forbid_unknown_fields=True):
    """The whole body; an image is an address, a data URL or base64."""

    modality: Literal["text", "image"]
    input: str | list[str]


def parse(body: Mapping[str, Any], model: ServedModel) -> Task:
    """Read a body. Raises Refusal."""
    request = read(body, Body)
    answer = request.answer(model)
    if isinstance(request.input, str):
        inputs = [("input", request.input)]
    else:
        check_some(request.input, "input")
        inputs = [(f"input[{i}]", value) for i, value in enumerate(request.input)]
    wanted = [
        request.wanted(field, value)
        if request.modality == "text"
        else request.wanted(field, None, value)
        for field, value in inputs
    ]
    return Task(wanted, answer)
