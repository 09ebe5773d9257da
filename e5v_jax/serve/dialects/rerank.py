"""``POST /v1/rerank`` (Cohere's and Jina's) and ``/score`` (vLLM's): the cosine of vectors."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import msgspec
import numpy as np

from e5v_jax.serve.dialects.cohere import error
from e5v_jax.serve.dialects.task import (
    Refusal,
    ServedModel,
    Task,
    Wanted,
    check_some,
    new_id,
    read,
)
from e5v_jax.serve.items import Embedded

__all__ = ["error", "parse"]  # its errors are Cohere's


class Item(msgspec.Struct, forbid_unknown_fields=True):
    """A document: a text, an image (an address, a data URL or base64), or both."""

    text: str | None = None
    image: str | None = None


class Body(msgspec.Struct, forbid_unknown_fields=True):
    """The whole body."""

    query: str | Item
    documents: list[str | Item]
    model: str | None = None
    top_n: Annotated[int, msgspec.Meta(ge=1)] | None = None
    return_documents: bool = False
    max_tokens_per_doc: Annotated[int, msgspec.Meta(ge=1)] | None = None
    priority: int = 0


def parse(body: Mapping[str, Any], model: ServedModel) -> Task:
    """Read a body. Raises Refusal."""
    request = read(body, Body)
    name = model.check_name(request.model)
    check_some(request.documents, "documents")
    query = to_wanted("query", request.query, "query")
    longest = request.max_tokens_per_doc
    wanted = [
        to_wanted(f"documents[{i}]", one, "document", longest, model)
        for i, one in enumerate(request.documents)
    ]

    def answer(embedded: Sequence[Embedded]) -> dict[str, Any]:
        scores = cosines(embedded[:1], embedded[1:])
        order = sorted(range(len(scores)), key=lambda i: -scores[i])[: request.top_n]
        results = []
        for i in order:
            result: dict[str, Any] = {"index": i, "relevance_score": scores[i]}
            if request.return_documents:
                one = request.documents[i]
                text = one if isinstance(one, str) else one.text
                result["document"] = {} if text is None else {"text": text}
            results.append(result)
        tokens = sum(one.tokens for one in embedded)
        return {
            "id": new_id(""),
            "model": name,
            "results": results,
            "usage": {"total_tokens": tokens, "prompt_tokens": tokens},
            "meta": {"billed_units": {"input_tokens": tokens}},
        }

    return Task([query, *wanted], answer)


def to_wanted(
    field: str,
    one: str | Item,
    role: str,
    longest: int | None = None,
    model: ServedModel | None = None,
) -> Wanted:
    """An item of a role; a text of more than ``longest`` tokens, if given, is cut at its end."""
    item = Item(text=one) if isinstance(one, str) else one
    if item.text is None and item.image is None:
        raise Refusal(400, "neither text nor image", field=field)
    truncate = longest is not None
    if model is not None and longest is not None and longest > model.max_length:
        longest = None
    return Wanted(
        field,
        item.text,
        item.image,
        prompt_name=role,
        truncate="end" if truncate else "none",
        max_length=longest,
    )


def cosines(a: Sequence[Embedded], b: Sequence[Embedded]) -> list[float]:
    """Cosines of pairs; where ``a`` is one, of that with each of ``b``."""
    left = np.stack([one.vector for one in a])
    right = np.stack([one.vector for one in b])
    found = np.einsum("nd,nd->n", np.broadcast_to(left, right.shape), right)
    return [float(value) for value in found.clip(-1, 1)]
