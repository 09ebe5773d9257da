"""Jina's ``POST /v1/embeddings``: texts and images mixed, with a task."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import msgspec
import numpy as np

from e5v_jax.serve.dialects.encodings import Encoding, check_encoding, cut, encode_vector
from e5v_jax.serve.dialects.task import Refusal, ServedModel, Task, Wanted, check_some, read
from e5v_jax.serve.items import Embedded

FIELDS = frozenset({"task", "normalized", "embedding_type", "late_chunking", "return_multivector"})
"""What only this dialect's body has."""


class Item(msgspec.Struct, forbid_unknown_fields=True):
    """An input: a text, an image (an address, a data URL or base64), or both."""

    text: str | None = None
    image: str | None = None


class Body(msgspec.Struct, forbid_unknown_fields=True):
    """The whole body."""

    input: str | Item | list[str | Item]
    model: str | None = None
    task: str | None = None
    dimensions: Annotated[int, msgspec.Meta(ge=1)] | None = None
    normalized: bool = True
    embedding_type: Encoding | list[Encoding] | None = None
    encoding_format: Encoding | None = None
    truncate: bool = False
    late_chunking: bool = False
    return_multivector: bool = False
    user: str | None = None


def parse(body: Mapping[str, Any], model: ServedModel) -> Task:
    """Read a body. Raises Refusal."""
    request = read(body, Body)
    name = model.check_name(request.model)
    model.check_dimensions(request.dimensions, field="dimensions")
    if request.late_chunking or request.return_multivector:
        field = "late_chunking" if request.late_chunking else "return_multivector"
        raise Refusal(400, "not offered: an input has one vector", field=field)
    if not request.normalized:
        raise Refusal(400, "false is not offered: vectors have length 1", field="normalized")
    asked = request.embedding_type if request.encoding_format is None else request.encoding_format
    asked = "float" if asked is None else asked
    encodings = [asked] if isinstance(asked, str) else asked
    check_some(encodings, "embedding_type")
    for encoding in encodings:
        dimensions = request.dimensions or model.dimensions
        check_encoding(encoding, dimensions, field="embedding_type")
    role = "query" if (request.task or "").endswith("query") else None
    if isinstance(request.input, list):
        check_some(request.input, "input")
        items = [(f"input[{i}]", one) for i, one in enumerate(request.input)]
    else:
        items = [("input", request.input)]
    wanted = [_wanted(field, one, role, truncate=request.truncate) for field, one in items]

    def answer(embedded: Sequence[Embedded]) -> dict[str, Any]:
        tokens = sum(one.tokens for one in embedded)
        return {
            "model": name,
            "object": "list",
            "usage": {"total_tokens": tokens, "prompt_tokens": tokens},
            "data": [
                {
                    "object": "embedding",
                    "index": index,
                    "embedding": _print(cut(one.vector, request.dimensions), encodings),
                }
                for index, one in enumerate(embedded)
            ],
        }

    return Task(wanted, answer)


def _wanted(field: str, one: str | Item, role: str | None, *, truncate: bool) -> Wanted:
    item = Item(text=one) if isinstance(one, str) else one
    if item.text is None and item.image is None:
        raise Refusal(400, "neither text nor image", field=field)
    return Wanted(
        field, item.text, item.image, prompt_name=role, truncate="end" if truncate else "none"
    )


def _print(vector: np.ndarray, encodings: Sequence[Encoding]) -> Any:
    if len(encodings) == 1:
        return encode_vector(vector, encodings[0])
    return {encoding: encode_vector(vector, encoding) for encoding in encodings}


def error(refusal: Refusal, request_id: str) -> dict[str, Any]:
    """Jina's body of an error."""
    return {"detail": str(refusal)}
