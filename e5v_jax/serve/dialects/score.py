"""vLLM's ``POST /score``: one text or image against many, or pairs of them, by cosine."""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from e5v_jax.serve.dialects.rerank import Item, cosines, to_wanted
from e5v_jax.serve.dialects.task import Refusal, ServedModel, Task, check_some, new_id, read
from e5v_jax.serve.dialects.vllm import error
from e5v_jax.serve.items import Embedded

__all__ = ["error", "parse"]  # its errors are vLLM's


class Body(msgspec.Struct, forbid_unknown_fields=True):
    """The whole body."""

    text_1: str | Item | list[str | Item]
    text_2: str | Item | list[str | Item]
    model: str | None = None
    truncate_prompt_tokens: int | None = None


def parse(body: Mapping[str, Any], model: ServedModel) -> Task:
    """Read a body. Raises Refusal."""
    names = {"queries": "text_1", "documents": "text_2", "data_1": "text_1", "data_2": "text_2"}
    request = read({names.get(name, name): value for name, value in body.items()}, Body)
    name = model.check_name(request.model)
    longest = request.truncate_prompt_tokens
    if longest is not None and longest < 1:
        raise Refusal(400, f"{longest}, expected at least 1", field="truncate_prompt_tokens")
    sides = {}
    for side, role in (("text_1", "query"), ("text_2", "document")):
        given = getattr(request, side)
        many = given if isinstance(given, list) else [given]
        check_some(many, side)
        fields = [f"{side}[{i}]" for i in range(len(many))] if isinstance(given, list) else [side]
        sides[side] = [
            to_wanted(field, one, role, longest, model)
            for field, one in zip(fields, many, strict=True)
        ]
    one, other = sides["text_1"], sides["text_2"]
    if len(one) not in (1, len(other)):
        raise Refusal(
            400, f"{len(one)}, expected one or as many as text_2, {len(other)}", field="text_1"
        )

    def answer(embedded: Sequence[Embedded]) -> dict[str, Any]:
        tokens = sum(each.tokens for each in embedded)
        scores = cosines(embedded[: len(one)], embedded[len(one) :])
        return {
            "id": new_id("score-"),
            "object": "list",
            "created": model.created,
            "model": name,
            "data": [
                {"index": index, "object": "score", "score": score}
                for index, score in enumerate(scores)
            ],
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }

    return Task([*one, *other], answer)
