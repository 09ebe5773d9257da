"""Cohere's ``POST /v2/embed``: texts, images or both, in several encodings at once."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import msgspec

from e5v_jax.prompts import Truncate
from e5v_jax.serve.dialects.encodings import Encoding, check_encoding, cut, encode_vector
from e5v_jax.serve.dialects.task import (
    Refusal,
    ServedModel,
    Task,
    Wanted,
    check_some,
    new_id,
    read,
)
from e5v_jax.serve.dialects.vllm import read_part
from e5v_jax.serve.items import Embedded

InputType = Literal["search_document", "search_query", "classification", "clustering", "image"]
_TRUNCATE: dict[str, Truncate] = {"NONE": "none", "START": "start", "END": "end"}


class Input(msgspec.Struct, forbid_unknown_fields=True):
    """An input of parts: a text and an image at most."""

    content: list[dict[str, Any]]


class Body(msgspec.Struct, forbid_unknown_fields=True):
    """The whole body."""

    input_type: InputType
    model: str | None = None
    texts: list[str] | None = None
    images: list[str] | None = None
    inputs: list[Input] | None = None
    max_tokens: Annotated[int, msgspec.Meta(ge=1)] | None = None
    output_dimension: Annotated[int, msgspec.Meta(ge=1)] | None = None
    embedding_types: list[Encoding] | None = None
    truncate: Literal["NONE", "START", "END"] = "END"  # Cohere's default
    priority: int = 0


def parse(body: Mapping[str, Any], model: ServedModel) -> Task:
    """Read a body. Raises Refusal."""
    request = read(body, Body)
    model.check_name(request.model)
    model.check_dimensions(request.output_dimension, field="output_dimension")
    encodings: list[Encoding] = list(dict.fromkeys(request.embedding_types or ("float",)))
    for encoding in encodings:
        dimensions = request.output_dimension or model.dimensions
        check_encoding(encoding, dimensions, field="embedding_types")
    items = _items(request)
    # a limit beyond the model's is no limit
    longest = None if (request.max_tokens or 0) > model.max_length else request.max_tokens
    wanted = [
        Wanted(
            field,
            text,
            image,
            prompt_name="query" if request.input_type == "search_query" else None,
            truncate=_TRUNCATE[request.truncate],
            max_length=longest,
        )
        for field, text, image in items
    ]
    images = sum(image is not None for _, _, image in items)

    def answer(embedded: Sequence[Embedded]) -> dict[str, Any]:
        vectors = [cut(one.vector, request.output_dimension) for one in embedded]
        units = {"input_tokens": sum(one.tokens for one in embedded)}
        return {
            "id": new_id(""),
            "response_type": "embeddings_by_type",
            "embeddings": {
                encoding: [encode_vector(vector, encoding) for vector in vectors]
                for encoding in encodings
            },
            "texts": request.texts or [],
            "meta": {
                "api_version": {"version": "2"},
                "billed_units": units | ({"images": images} if images else {}),
            },
        }

    return Task(wanted, answer)


def _items(request: Body) -> list[tuple[str, str | None, str | None]]:
    """(field, text, image) of each input."""
    given = {"texts": request.texts, "images": request.images, "inputs": request.inputs}
    named = [name for name, value in given.items() if value is not None]
    if len(named) != 1:
        found = " and ".join(named) or "none of them"
        raise Refusal(400, f"expected one of texts, images and inputs, found {found}")
    (name,) = named
    check_some(given[name] or [], name)
    if request.texts is not None:
        return [(f"texts[{i}]", text, None) for i, text in enumerate(request.texts)]
    if request.images is not None:
        return [(f"images[{i}]", None, image) for i, image in enumerate(request.images)]
    return [_mixed(f"inputs[{i}].content", one) for i, one in enumerate(request.inputs or [])]


def _mixed(field: str, one: Input) -> tuple[str, str | None, str | None]:
    check_some(one.content, field)
    read_parts = [read_part(part, f"{field}[{i}]") for i, part in enumerate(one.content)]
    texts = [text for text, _ in read_parts if text is not None]
    images = [image for _, image in read_parts if image is not None]
    if len(images) > 1:
        raise Refusal(400, f"{len(images)} images, expected one at most", field=field)
    return field, "\n".join(texts) if texts else None, images[0] if images else None


def error(refusal: Refusal, request_id: str) -> dict[str, Any]:
    """Cohere's body of an error."""
    return {"id": request_id, "message": str(refusal)}
