"""Bounds that hold before anything is decoded: the size of a body, the bytes held by all requests.

What the engine may hold is its own (waiting.py); here are the bodies being read and the images
being decoded, which are not there yet.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from starlette.requests import ClientDisconnect, Request

from e5v_jax.serve.dialects.task import Refusal


@dataclass(frozen=True)
class Bounds:
    """What one request may have, and all together."""

    body_bytes: int
    waiting_bytes: int
    items: int
    seconds: float  # for a body to arrive


class Held:
    """The bytes that one request holds."""

    def __init__(self, admission: "Admission") -> None:
        """Nothing yet."""
        self._admission, self.bytes = admission, 0

    def add(self, count: int, field: str | None = None) -> None:
        """Take room. Raises Refusal: 413 as it is more than there is, 429 as others have it."""
        limit = self._admission.bounds.waiting_bytes
        if self.bytes + count > limit:
            raise Refusal(413, f"more than the {limit} bytes that may be held", field=field)
        if self._admission.bytes + count > limit:
            raise Refusal(
                429,
                f"too much is waiting: more than the {limit} bytes that may be held",
                field=field,
                retry_after=1.0,
            )
        self.bytes += count
        self._admission.bytes += count

    def free(self) -> None:
        """Give it all back."""
        self._admission.bytes -= self.bytes
        self.bytes = 0


class Admission:
    """This counts what all requests hold, in the thread of the event loop."""

    def __init__(self, bounds: Bounds) -> None:
        """``bounds`` hold for all that is counted here."""
        self.bounds, self.bytes = bounds, 0

    @asynccontextmanager
    async def hold(self) -> AsyncIterator[Held]:
        """Count a request's bytes, until its end."""
        held = Held(self)
        try:
            yield held
        finally:
            held.free()

    async def read_body(self, request: Request, held: Held) -> bytes:
        """Read a body, counted before it is there.

        Raises Refusal: 413 for one too large, 408 for one too slow, 400 for one cut off, 429.
        """
        limit = self.bounds.body_bytes
        too_large = Refusal(413, f"the body has more than the {limit} bytes allowed")
        announced = request.headers.get("content-length")
        if announced is not None:
            if not announced.isdecimal() or len(announced) > 18 or int(announced) > limit:
                raise too_large
            held.add(int(announced))
        chunks, size = [], 0
        stream = request.stream()
        try:
            async with asyncio.timeout(self.bounds.seconds):
                async for chunk in stream:
                    size += len(chunk)
                    if size > limit:
                        raise too_large
                    if announced is None:
                        held.add(len(chunk))
                    chunks.append(chunk)
        except TimeoutError:
            raise Refusal(
                408, f"the body did not arrive in {self.bounds.seconds:g} seconds"
            ) from None
        except ClientDisconnect:
            raise Refusal(400, "the body was cut off") from None
        return b"".join(chunks)

    def check_items(self, count: int) -> None:
        """Raise Refusal: a request has more than it may."""
        if count > self.bounds.items:
            raise Refusal(413, f"{count} inputs, at most {self.bounds.items} are taken at once")
