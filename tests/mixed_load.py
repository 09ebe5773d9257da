"""What a server meets in a day, in a minute: every answer is held against the right vector."""

import asyncio
import base64
import json
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from odd_images import encode, noise
from serve_load import Client, Reply

from e5v_jax import E5V

TOLERANCE = 1e-6  # of an entry of a vector of unit length
SMALL_PNG = base64.b64encode(b"\x89PNG\r\n\x1a\n").decode()
BAD: tuple[object, ...] = (
    b"",
    b"{",
    b"[]",
    b"null",
    b'{"input": "\xff"}',
    b"[" * 100_000,
    {},
    {"input": []},
    {"input": 5},
    {"input": None},
    {"input": [["a"]]},
    {"input": [{"text": 5}]},
    {"input": [-1, 10**12]},
    {"input": "a", "model": "no-such-model"},
    {"input": "a", "dimensions": 0},
    {"input": "a", "dimensions": 10**9},
    {"input": "a", "encoding_format": "hex"},
    {"input": "a", "no_such_field": 1},
    {"input": "dog " * 10_000},
    {"input": [{"image": "file:///etc/passwd"}]},
    {"input": [{"image": "http://127.0.0.1/a.png"}]},
    {"input": [{"image": f"data:image/png;base64,{SMALL_PNG}"}]},
    {"input": [{"image": "data:image/png;base64,!"}]},
    {"messages": []},
    {"messages": [{"role": "user", "content": [{"type": "video"}]}]},
)
"""Bodies that a server refuses with 400, 404, 413 or 422."""


@dataclass(frozen=True)
class Answers:
    """Inputs and their right vectors, float32 [N, D] each."""

    texts: Sequence[str]
    text_vectors: np.ndarray
    images: Sequence[bytes] = ()
    image_vectors: np.ndarray = field(default_factory=lambda: np.zeros((0, 1), np.float32))
    captions: Sequence[str] = ()
    """Texts that go with the images: one each."""
    both_vectors: np.ndarray = field(default_factory=lambda: np.zeros((0, 1), np.float32))


def right_answers(model: E5V, texts: Sequence[str]) -> Answers:
    """Vectors of E5V.encode: texts, images of several sizes, and both."""
    images = [
        encode(noise(20 + 9 * i, 80 - 7 * i, seed=i), ("PNG", "JPEG", "WEBP", "GIF")[i % 4])
        for i in range(8)
    ]
    captions = list(texts[: len(images)])
    both = [{"image": image, "text": text} for image, text in zip(images, captions, strict=True)]
    found = model.encode([*texts, *images, *both], show_progress_bar=False)
    text_vectors, image_vectors, both_vectors = np.split(
        found, [len(texts), len(texts) + len(images)]
    )
    return Answers(texts, text_vectors, images, image_vectors, captions, both_vectors)


@dataclass
class Tally:
    """What came back."""

    vectors: Counter[str] = field(default_factory=Counter)
    """Right ones, by kind of request."""
    wrong: list[str] = field(default_factory=list)
    refused: Counter[int] = field(default_factory=Counter)
    """By status, of good requests: 429 and 503 may be."""
    bad: Counter[int] = field(default_factory=Counter)
    """By status, of bad ones."""
    left: int = 0
    """Requests whose client went away."""
    broken: int = 0
    """Connections that ended without an answer."""
    largest: float = 0.0
    """Difference of an entry to the right vector's."""

    def check(self, kind: str, reply: Reply, expected: np.ndarray) -> None:
        if reply.status != 200:
            self.refused[reply.status] += 1
            return
        found = reply.vectors
        if found.shape != expected.shape or not np.isfinite(found).all():
            self.wrong.append(f"{kind}: shape {found.shape} or not finite")
            return
        error = float(np.abs(found - expected).max())
        self.largest = max(self.largest, error)
        if error > TOLERANCE:
            self.wrong.append(f"{kind}: {error:.1e}")
        self.vectors[kind] += len(found)


def data_url(image: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(image).decode()}"


class MixedLoad:
    """Requests of all kinds, drawn at random, over one connection each worker."""

    def __init__(self, answers: Answers, *, leave: bool = True, bad: bool = True) -> None:
        """``leave``: some clients go before they are answered."""
        self.answers, self.tally = answers, Tally()
        self.ending = False
        kinds = {"texts": 5, "one text": 5}
        kinds |= {"images": 2, "messages": 2} if answers.images else {}
        kinds |= {"bad": 2} if bad else {}
        kinds |= {"leave": 1, "half": 1} if leave else {}
        self.kinds, self.weights = list(kinds), list(kinds.values())

    async def run(self, port: int, seconds: float, *, workers: int = 16, seed: int = 0) -> Tally:
        """Send for so many seconds, or until ``ending``, then wait for what is on its way."""
        end = time.monotonic() + seconds
        await asyncio.gather(
            *(self._work(port, end, random.Random(seed * 1000 + i)) for i in range(workers))
        )
        return self.tally

    async def _work(self, port: int, end: float, rng: random.Random) -> None:
        client = Client(port)
        while time.monotonic() < end and not self.ending:
            (kind,) = rng.choices(self.kinds, self.weights)
            try:
                await asyncio.wait_for(self._send(client, kind, rng), 60)
            except (OSError, EOFError):
                self.tally.broken += 1
                client.close()
                await asyncio.sleep(0.05)
        client.close()

    async def _send(self, client: Client, kind: str, rng: random.Random) -> None:
        given, tally = self.answers, self.tally
        if kind == "bad":
            reply = await client.post(rng.choice(BAD))
            tally.bad[reply.status] += 1
            await self._wait(reply)
            return
        if kind in ("leave", "half"):
            some = json.dumps({"input": rng.sample(list(given.texts), 3)}).encode()
            claim = len(some) * 2 if kind == "half" else None  # half: a body that never ends
            await client.send(some, claim=claim)
            await asyncio.sleep(rng.random() * 0.1)
            client.close()
            tally.left += 1
            return
        body, expected = self._draw(kind, rng)
        reply = await client.post(body)
        tally.check(kind, reply, expected)
        await self._wait(reply)

    async def _wait(self, reply: Reply) -> None:
        if reply.status in (429, 503):  # as a polite client does, but not as long
            await asyncio.sleep(0.05)

    def _draw(self, kind: str, rng: random.Random) -> tuple[dict[str, Any], np.ndarray]:
        """A body and the vectors of its answer."""
        given = self.answers
        encoding = {"encoding_format": rng.choice(["float", "base64"])}
        if kind == "one text":
            at = rng.randrange(len(given.texts))
            return {"input": given.texts[at], **encoding}, given.text_vectors[[at]]
        if kind == "texts":
            rows = [rng.randrange(len(given.texts)) for _ in range(rng.randint(2, 12))]
            return {"input": [given.texts[i] for i in rows], **encoding}, given.text_vectors[rows]
        at = rng.randrange(len(given.images))
        url = data_url(given.images[at])
        if kind == "messages":
            parts = [
                {"type": "image_url", "image_url": {"url": url}},
                {"type": "text", "text": given.captions[at]},
            ]
            messages = [{"role": "user", "content": parts}]
            return {"messages": messages, **encoding}, given.both_vectors[[at]]
        row = rng.randrange(len(given.texts))
        inputs: list[object] = [{"image": url}, {"text": given.texts[row]}]
        return {"input": inputs, **encoding}, np.stack(
            [given.image_vectors[at], given.text_vectors[row]]
        )
