"""What waits for the device: bounded, equal inputs once, in an order that is fair to all callers.

Nothing here knows a device or a thread; the engine calls it under its lock.
"""

import bisect
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from e5v_jax.families.base import Measured
from e5v_jax.serve.items import Embedded

_SHORTEST = 1e-12  # as E5V.encode divides


class Overloaded(RuntimeError):
    """More waits than is allowed; the message says what."""

    def __init__(self, reason: str, retry_after: float) -> None:
        """``retry_after`` are seconds after which there may be room."""
        super().__init__(reason)
        self.retry_after = retry_after


class BadItem(ValueError):
    """An item that cannot be embedded; the message says why, the caller adds which."""


class UnusableVector(RuntimeError):
    """The model made a vector that is not finite or zero."""


class TooLarge(ValueError):
    """One call has more than may ever wait."""


class Draining(RuntimeError):
    """Nothing more is taken: the engine is about to end, or its device failed."""


@dataclass(frozen=True)
class Limits:
    """The most that may wait or be computed at a time."""

    items: int
    tokens: int
    bytes: int  # of texts and of decoded pixels


@dataclass(eq=False, slots=True)
class Answer:
    """What the caller of one item waits for."""

    future: "Future[Embedded]" = field(default_factory=Future)
    missing: int = 0  # vectors to come: two where those of image and text are added
    total: np.ndarray | None = None  # float32 [D], the sum of those that came
    tokens: int = 0
    parts: "list[Part]" = field(default_factory=list)

    def add(self, vector: np.ndarray, tokens: int) -> None:
        """Take a vector, float32 [D], not normalised; the last one completes the answer."""
        self.total = vector if self.total is None else self.total + vector
        self.tokens += tokens
        self.missing -= 1
        if self.missing == 0 and not self.future.done() and self._begin():
            scaled = self.total / max(float(np.linalg.norm(self.total)), _SHORTEST)
            self.future.set_result(Embedded(scaled, self.tokens))

    def fail(self, error: Exception) -> None:
        """Answer with an error, if nothing was answered yet."""
        if not self.future.done() and self._begin():
            self.future.set_exception(error)

    def _begin(self) -> bool:
        return self.future.set_running_or_notify_cancel()


@dataclass(eq=False, slots=True)
class Part:
    """What is computed once: an item, or its image or text where their vectors are added."""

    key: bytes
    measured: Measured
    size: int  # bytes
    prepared: Any = None  # what Processor.load made of it
    tag: int = 0  # its place in the order, in tokens
    since: float = field(default_factory=time.monotonic)
    answers: dict[Answer, None] = field(default_factory=dict)  # in the order they came
    started: bool = False


class Waiting:
    """The parts that wait, those being computed, and a cache of vectors."""

    def __init__(self, limits: Limits, cache_size: int) -> None:
        """``cache_size`` is a number of vectors."""
        self.limits, self._cache_size = limits, cache_size
        self.items = self.tokens = self.bytes = 0  # not answered; not yet computed, the last two
        self.speed = 0.0  # tokens a second, lately
        self._queue: list[Part] = []  # by tag, loaded ones
        self._known: dict[bytes, Part] = {}  # waiting, being loaded or being computed
        self._cache: OrderedDict[bytes, tuple[np.ndarray, int]] = OrderedDict()
        self._now = 0  # the tag of what was started last

    def __len__(self) -> int:
        """Parts that could be computed now, perhaps for nobody any more."""
        return len(self._queue)

    def reserve(self, items: int) -> None:
        """Make room for the answers of a call. Raises Overloaded, TooLarge."""
        self._check("items", items, self.items, self.limits.items)
        self.items += items

    def accept(self, parts: Sequence[Part]) -> list[Part]:
        """Take the parts of one call, all or none, and give those that nobody asked for before.

        Callers take turns by tokens: the parts of a long call stand apart by their lengths, so that
        one that comes later and is short stands between them. (Start-time fair queueing; Goyal,
        Vin, Cheng 1996.) Raises Overloaded, TooLarge.
        """
        new = [part for part in parts if part.key not in self._known]
        tokens = sum(part.measured.length for part in new)
        size = sum(part.size for part in new)
        if new:
            self._check("tokens", tokens, self.tokens, self.limits.tokens)
            self._check("bytes", size, self.bytes, self.limits.bytes)
        self.tokens += tokens
        self.bytes += size
        tag = self._now
        for part in parts:
            known = self._known.setdefault(part.key, part)
            if known is not part:
                known.answers |= part.answers
            else:
                part.tag = tag
                tag += part.measured.length
            for answer in part.answers:
                answer.parts.append(known)
        return new

    def put(self, part: Part) -> None:
        """Queue an accepted part, which is loaded now."""
        bisect.insort(self._queue, part, key=lambda other: other.tag)

    def window(self, tokens: int) -> list[Part]:
        """The first parts of the queue, of about so many tokens, without those nobody wants."""
        self._queue = [part for part in self._queue if part.answers]
        found, total = [], 0
        for part in self._queue:
            if total >= tokens:
                break
            found.append(part)
            total += part.measured.length
        return found

    def start(self, parts: Sequence[Part]) -> None:
        """Take parts from the queue."""
        for part in parts:
            part.started = True
            self._count_out(part)
        self._now = max(self._now, min(part.tag for part in parts))
        self._queue = [part for part in self._queue if not part.started]

    def finish(self, part: Part, vector: np.ndarray | None) -> list[Answer]:
        """Take a part off the books, its vector [D] into the cache; gives who waits for it."""
        self._known.pop(part.key, None)
        if not part.started:
            part.started = True
            self._count_out(part)
        if vector is not None and self._cache_size:
            self._cache[part.key] = vector, part.measured.length
            self._cache.move_to_end(part.key)
            if len(self._cache) > self._cache_size:
                self._cache.popitem(last=False)
        answers, part.answers = list(part.answers), {}
        return answers

    def cached(self, key: bytes) -> tuple[np.ndarray, int] | None:
        """The vector [D], not normalised, and the tokens of a part that was computed before."""
        found = self._cache.get(key)
        if found is not None:
            self._cache.move_to_end(key)
        return found

    def leave(self, answer: Answer) -> None:
        """Take an answer off the books; what nobody else waits for is not computed."""
        self.items -= 1
        for part in answer.parts:
            if answer in part.answers:
                del part.answers[answer]
                if not part.answers and not part.started:
                    self.finish(part, None)

    def all_parts(self) -> list[Part]:
        """Every part that is waiting, being loaded or being computed."""
        return list(self._known.values())

    @property
    def is_full(self) -> bool:
        """Whether a limit is reached."""
        limits = self.limits
        return (
            self.items >= limits.items or self.tokens >= limits.tokens or self.bytes >= limits.bytes
        )

    @property
    def retry_after(self) -> float:
        """Seconds until about half of what waits is done: 1 to 60."""
        seconds = self.tokens / self.speed / 2 if self.speed else 1.0
        return min(max(1.0, seconds), 60.0)

    def _check(self, name: str, more: int, waiting: int, limit: int) -> None:
        if more > limit:
            raise TooLarge(f"{more} {name} at once, at most {limit} are taken: send fewer")
        if waiting + more > limit:
            raise Overloaded(
                f"{waiting} {name} are waiting, with these {more} more than the {limit} allowed",
                self.retry_after,
            )

    def _count_out(self, part: Part) -> None:
        self.tokens -= part.measured.length
        self.bytes -= part.size
