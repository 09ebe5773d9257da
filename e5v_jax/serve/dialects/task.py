"""What every dialect parses to: a task; and how a request is refused."""

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec

from e5v_jax.prompts import Truncate
from e5v_jax.serve.items import Embedded

T = TypeVar("T")
_CHARACTERS = 64  # for each token that the model takes; words have four


class Refusal(Exception):
    """A request that is not answered; a dialect prints it as its clients expect it."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        field: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        """``status`` is HTTP's, ``field`` the place in the body, ``code`` a word for programs.

        ``retry_after`` are seconds after which another try makes sense.
        """
        super().__init__(message if field is None else f"{field}: {message}")
        self.status, self.field, self.code, self.retry_after = status, field, code, retry_after


@dataclass(frozen=True, slots=True)
class Wanted:
    """An item whose image is still what the client wrote: a data URL, base64 or an address."""

    field: str  # where it stands in the body, for messages
    text: str | None = None
    image: str | None = None
    prompt_name: str | None = None
    instruction: str | None = None
    truncate: Truncate = "none"
    max_length: int | None = None


@dataclass(frozen=True, slots=True)
class Task:
    """What is to be embedded for a request, and what is answered."""

    wanted: Sequence[Wanted]
    answer: Callable[[Sequence[Embedded]], Any]
    """From the embedded items, in their order, to what is sent as JSON."""


@dataclass(frozen=True)
class ServedModel:
    """What dialects need to know of the model."""

    names: tuple[str, ...]
    dimensions: int
    max_length: int  # tokens, prompt and template counted
    modalities: tuple[str, ...]
    decode: Callable[[Sequence[int]], str]
    """From token ids to the text; raises ValueError: no such id."""
    created: int = field(default_factory=lambda: int(time.time()))

    def check_name(self, name: str | None) -> str:
        """The model's own name, if a client calls it so or not at all. Raises Refusal (404)."""
        if name is not None and name not in self.names:
            known = ", ".join(self.names)
            raise Refusal(
                404,
                f"the model {shorten(name)!r} does not exist, this serves {known}",
                field="model",
                code="model_not_found",
            )
        return name or self.names[0]

    def check_text(self, text: str | None, *, field: str) -> None:
        """Raise Refusal: a text so long that even to find out where to cut it is too much work."""
        most = _CHARACTERS * self.max_length
        if text is not None and len(text) > most:
            raise Refusal(413, f"{len(text)} characters, at most {most} are taken", field=field)

    def check_dimensions(self, dimensions: int | None, *, field: str) -> None:
        """Raise Refusal: a vector has not as many."""
        if dimensions is not None and not 1 <= dimensions <= self.dimensions:
            raise Refusal(400, f"{dimensions}, expected 1 to {self.dimensions}", field=field)


def read(body: Mapping[str, Any], kind: type[T]) -> T:
    """A body as the given struct. Raises Refusal, which names the field."""
    try:
        return msgspec.convert(body, kind)
    except msgspec.ValidationError as error:
        message, _, place = str(error).partition(" - at `$")
        place = place.removesuffix("`").lstrip(".")
        if "unknown field `" in message:  # refused rather than not followed
            name = message.split("`")[1]
            raise Refusal(400, "unknown field", field=f"{place}.{name}".lstrip(".")) from None
        if "missing required field `" in message:
            name = message.split("`")[1]
            raise Refusal(400, "missing", field=f"{place}.{name}".lstrip(".")) from None
        raise Refusal(400, message, field=place or None) from None


def check_some(values: Sequence[object], field: str) -> None:
    """Raise Refusal: there is nothing in a list."""
    if not values:
        raise Refusal(400, "empty, expected at least one", field=field)


def new_id(prefix: str) -> str:
    """A name for an answer."""
    return f"{prefix}{uuid.uuid4().hex}"


def shorten(text: str) -> str:
    """What a client wrote, short enough for a message."""
    return text if len(text) <= 80 else f"{text[:80]}..."
