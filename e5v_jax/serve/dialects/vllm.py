"""vLLM's extension of OpenAI's embeddings: ``messages``, one conversation or a batch of them.

What a user says, an image at most and text, is the item; what a system message says is the
instruction. vLLM would put the messages into the checkpoint's own chat template; here they stand in
the prompt and template that the model was trained with.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import msgspec

from e5v_jax.serve.dialects.openai import Options
from e5v_jax.serve.dialects.task import (
    Refusal,
    ServedModel,
    Task,
    Wanted,
    check_some,
    new_id,
    read,
)


class Message(msgspec.Struct, forbid_unknown_fields=True):
    """One message; its parts are read by :func:`_content`."""

    role: str
    content: str | list[dict[str, Any]]


class Body(Options, kw_only=True, forbid_unknown_fields=True):
    """The whole body."""

    messages: list[Message | list[Message]]
    add_generation_prompt: bool = False
    continue_final_message: bool = False


def parse(body: Mapping[str, Any], model: ServedModel) -> Task:
    """Read a body. Raises Refusal."""
    messages = body.get("messages")
    if isinstance(messages, list):
        check_some(messages, "messages")
    request = read(body, Body)
    answer = request.answer(model)
    wanted = []
    if isinstance(request.messages[0], list):
        for i, conversation in enumerate(request.messages):
            if not isinstance(conversation, list):
                raise Refusal(400, "a message among conversations", field=f"messages[{i}]")
            wanted.append(_item(request, f"messages[{i}]", conversation))
    else:
        single = []
        for i, message in enumerate(request.messages):
            if isinstance(message, list):
                raise Refusal(400, "a conversation among messages", field=f"messages[{i}]")
            single.append(message)
        wanted.append(_item(request, "messages", single))
    own = {"id": new_id("embd-"), "created": model.created}
    return Task(wanted, lambda embedded: {**own, **answer(embedded)})


def _item(request: Body, field: str, messages: list[Message]) -> Wanted:
    check_some(messages, field)
    text: list[str] = []
    images: list[str] = []
    instruction = request.instruction
    for position, message in enumerate(messages):
        place = f"{field}[{position}].content"
        texts, found = _content(place, message.content)
        if message.role == "system" and not found:
            instruction = "\n".join(texts) or instruction
        elif message.role == "user":
            text += texts
            images += found
        elif message.role != "assistant" or texts or found:  # an empty one ends some templates
            raise Refusal(
                400,
                f"what {message.role[:20]!r} says is not embedded: expected messages of the user, "
                "and texts of the system",
                field=place,
            )
    if len(images) > 1:
        raise Refusal(400, f"{len(images)} images, expected one at most", field=field)
    if not text and not images:
        raise Refusal(400, "neither a text nor an image of the user", field=field)
    image = images[0] if images else None
    return replace(request.wanted(field, "\n".join(text) or None, image), instruction=instruction)


def _content(field: str, content: str | list[dict[str, Any]]) -> tuple[list[str], list[str]]:
    """Texts and images of a message."""
    if isinstance(content, str):
        return ([content] if content else []), []
    texts, images = [], []
    for position, part in enumerate(content):
        place = f"{field}[{position}]"
        text, image = read_part(part, place)
        texts += [text] if text else []
        images += [image] if image is not None else []
    return texts, images


def read_part(part: Mapping[str, Any], field: str) -> tuple[str | None, str | None]:
    """Text or image of a part of a message, ``{"type": "text" or "image_url", ...}``."""
    kind = part.get("type")
    if kind == "text" and isinstance(part.get("text"), str):
        return part["text"], None
    if kind == "image_url":
        value = part.get("image_url")
        url = value.get("url") if isinstance(value, Mapping) else value
        if isinstance(url, str):
            return None, url
    raise Refusal(
        400,
        'expected {"type": "text", "text": ...} or '
        '{"type": "image_url", "image_url": {"url": ...}}',
        field=field,
    )


def error(refusal: Refusal, request_id: str) -> dict[str, Any]:
    """vLLM's body of an error."""
    names = {400: "BadRequestError", 401: "AuthenticationError", 404: "NotFoundError"}
    kind = "InternalServerError" if refusal.status >= 500 else "BadRequestError"
    return {
        "error": {
            "message": str(refusal),
            "type": names.get(refusal.status, kind),
            "param": refusal.field,
            "code": refusal.status,
        }
    }
