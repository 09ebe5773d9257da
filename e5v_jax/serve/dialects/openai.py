"""OpenAI's ``POST /v1/embeddings``: texts or token ids, as numbers or base64.

Token ids are decoded to their text, which then stands in the prompt as any other.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, Literal

import msgspec

from e5v_jax.prompts import Truncate
from e5v_jax.serve.dialects.encodings import Encoding, cut, encode_vector
from e5v_jax.serve.dialects.task import Refusal, ServedModel, Task, Wanted, check_some, read
from e5v_jax.serve.items import Embedded

_TYPES = {401: "authentication_error", 429: "rate_limit_error"}


class Options(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What OpenAI's body has beside the input, and what vLLM and this server add."""

    model: str | None = None
    dimensions: Annotated[int, msgspec.Meta(ge=1)] | None = None
    encoding_format: Literal["float", "base64"] = "float"
    user: str | None = None  # who asks, which changes nothing
    # vLLM's; of these, the first two change what is embedded
    truncate_prompt_tokens: Annotated[int, msgspec.Meta(ge=-1)] | None = None
    truncation_side: Literal["left", "right"] = "left"
    add_special_tokens: bool = True
    priority: int = 0
    request_id: str | None = None
    # this server's, the arguments of E5V.encode
    prompt_name: str | None = None
    instruction: str | None = None
    truncate: Truncate = "none"
    max_length: Annotated[int, msgspec.Meta(ge=1)] | None = None

    def wanted(self, field: str, text: str | None, image: str | None = None) -> Wanted:
        """An item with these options. Raises Refusal."""
        truncate, max_length = self.truncate, self.max_length
        if self.truncate_prompt_tokens == 0:
            raise Refusal(400, "0, expected -1 or at least 1", field="truncate_prompt_tokens")
        if self.truncate_prompt_tokens is not None:
            truncate = "start" if self.truncation_side == "left" else "end"
            max_length = self.truncate_prompt_tokens if self.truncate_prompt_tokens > 0 else None
        return Wanted(field, text, image, self.prompt_name, self.instruction, truncate, max_length)

    def answer(self, model: ServedModel) -> Callable[[Sequence[Embedded]], dict[str, Any]]:
        """What prints the answer. Raises Refusal: the model is another, or has less dimensions."""
        name = model.check_name(self.model)
        model.check_dimensions(self.dimensions, field="dimensions")
        return partial(
            embedding_list, model=name, encoding=self.encoding_format, dimensions=self.dimensions
        )


class Body(Options, kw_only=True, forbid_unknown_fields=True):
    """The whole body."""

    input: str | list[str | int | list[int]]


def parse(body: Mapping[str, Any], model: ServedModel) -> Task:
    """Read a body. Raises Refusal."""
    request = read(body, Body)
    answer = request.answer(model)
    texts = _texts(request.input, model)
    return Task([request.wanted(field, text) for field, text in texts], answer)


def _texts(given: str | list[Any], model: ServedModel) -> list[tuple[str, str]]:
    """Field and text of each input."""
    if isinstance(given, str):
        return [("input", given)]
    check_some(given, "input")
    if all(isinstance(value, int) for value in given):
        return [("input", _decode("input", given, model))]
    found = []
    for position, value in enumerate(given):
        field = f"input[{position}]"
        if isinstance(value, int):
            raise Refusal(400, "a number among texts or lists of token ids", field=field)
        text = value if isinstance(value, str) else _decode(field, value, model)
        found.append((field, text))
    return found


def _decode(field: str, ids: list[int], model: ServedModel) -> str:
    check_some(ids, field)
    try:
        return model.decode(ids)
    except ValueError as error:
        raise Refusal(400, str(error), field=field) from None


def embedding_list(
    embedded: Sequence[Embedded], *, model: str, encoding: Encoding, dimensions: int | None
) -> dict[str, Any]:
    """OpenAI's answer."""
    tokens = sum(one.tokens for one in embedded)
    return {
        "object": "list",
        "data": [
            {
                "object": "embedding",
                "index": index,
                "embedding": encode_vector(cut(one.vector, dimensions), encoding),
            }
            for index, one in enumerate(embedded)
        ],
        "model": model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


def error(refusal: Refusal, request_id: str) -> dict[str, Any]:
    """OpenAI's body of an error."""
    kind = "server_error" if refusal.status >= 500 else "invalid_request_error"
    return {
        "error": {
            "message": str(refusal),
            "type": _TYPES.get(refusal.status, kind),
            "param": refusal.field,
            "code": refusal.code,
        }
    }
