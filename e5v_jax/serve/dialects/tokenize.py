"""``POST /tokenize``, vLLM's (``prompt``) and Cohere's (``text``): the tokens of a text.

They are the text's own, so that ``/v1/embeddings`` takes them for the text; ``count_in_prompt``
says how many positions it takes with the prompt and the template around it.
"""

from collections.abc import Mapping
from typing import Any

import msgspec

from e5v_jax.data.inputs import InputError
from e5v_jax.families.base import Processor
from e5v_jax.prompts import TextError
from e5v_jax.serve.dialects.task import Refusal, ServedModel, read
from e5v_jax.serve.dialects.vllm import error

__all__ = ["answer", "error"]  # its errors are vLLM's


class Body(msgspec.Struct, forbid_unknown_fields=True):
    """The whole body."""

    prompt: str | None = None
    text: str | None = None
    model: str | None = None
    add_special_tokens: bool = False  # none are added
    return_token_strs: bool = False
    prompt_name: str | None = None


def answer(body: Mapping[str, Any], model: ServedModel, processor: Processor) -> dict[str, Any]:
    """Answer a body. Raises Refusal."""
    request = read(body, Body)
    model.check_name(request.model)
    text, field = (request.prompt, "prompt") if request.text is None else (request.text, "text")
    if text is None or (request.prompt is not None and request.text is not None):
        raise Refusal(400, "expected prompt or text", field="prompt")
    model.check_text(text, field=field)
    try:
        processor.check_text(text)
        choice = processor.preset.choose(request.prompt_name)
        (whole,) = processor.measure([text], choice)
    except InputError as reason:
        raise Refusal(400, reason.reason, field=field) from None
    except TextError as reason:
        raise Refusal(400, str(reason), field=field) from None
    except ValueError as reason:
        raise Refusal(400, str(reason), field="prompt_name") from None
    ids = processor.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    names = processor.tokenizer.convert_ids_to_tokens(ids)
    found = {
        "count": len(ids),
        "count_in_prompt": whole.length,
        "max_model_len": model.max_length,
        "tokens": ids,
    }
    if field == "text":
        found["token_strings"] = names
    elif request.return_token_strs:
        found["token_strs"] = names
    return found
