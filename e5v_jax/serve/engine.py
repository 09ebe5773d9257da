"""One thread that owns the device: what waits when it is free becomes the next batch."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache, partial

import jax
import numpy as np

from e5v_jax.encode.arguments import choose_prompts
from e5v_jax.encode.batching import Batch
from e5v_jax.encode.e5v import E5V
from e5v_jax.encode.vectors import find_unusable
from e5v_jax.families.base import BatchShape
from e5v_jax.serve.items import Embedded, Item
from e5v_jax.serve.observer import BatchReport, Observer
from e5v_jax.serve.prepare import choose_parts, tokenise
from e5v_jax.serve.shapes import fitting_shape, grow_batch
from e5v_jax.serve.waiting import (
    Answer,
    BadItem,
    Draining,
    Limits,
    Part,
    UnusableVector,
    Waiting,
)

_logger = logging.getLogger("e5v_jax")
_DECODING_THREADS = 4  # Pillow decodes and resizes without Python's lock
# Positions of a batch. On a CPU smaller ones than `E5V.encode` makes are as fast, and of the few
# texts that wait they hold those more alike.
_MAX_TOKENS = {"cpu": 512, "gpu": 16384, "tpu": 16384}
_WINDOW = 8  # batches' worth of items, the first in line, that are sorted by length
_IN_FLIGHT = 2  # batches on the device: a full one waits there while another one runs
_MEMORY = 0.8  # of the speed so far, when a batch tells the speed anew


class Engine:
    """This embeds items in batches of whatever waits when the device is free; there is no timer.

    A batch holds items of similar length, up to the token budget. Equal items are computed once,
    and vectors that were computed before come from a cache. A device call that fails ends it: all
    who wait are told, ``healthy`` is False, and nothing more is taken.
    """

    def __init__(
        self,
        model: E5V,
        *,
        max_waiting_items: int = 4096,
        max_waiting_tokens: int = 2**20,
        max_waiting_bytes: int = 2**29,
        cache_size: int = 0,
        max_num_batched_tokens: int | None = None,
        observer: Observer | None = None,
    ) -> None:
        """Start the thread. Of the ``model``, nobody else may use the device meanwhile.

        Args:
            max_waiting_items: most items that are not answered yet, and so on; more is refused.
            max_waiting_bytes: of texts and of decoded images.
            cache_size: vectors that are kept, those used last.
            max_num_batched_tokens: most positions of a batch, padding included.
        """
        self.model = model
        self.max_tokens = max_num_batched_tokens or _MAX_TOKENS[model.runtime.platform]
        self.failure: Exception | None = None
        limits = Limits(max_waiting_items, max_waiting_tokens, max_waiting_bytes)
        self._waiting = Waiting(limits, cache_size)
        self._observer = observer or Observer()
        self._prompts = lru_cache(maxsize=64)(partial(choose_prompts, model.processor))
        self._to_compile: deque[tuple[BatchShape, Future[None]]] = deque()
        self._draining = self._ending = False
        self._changed = threading.Condition()  # holds the lock of all that threads share
        self._pool = ThreadPoolExecutor(_DECODING_THREADS, "e5v-decode")
        self._thread = threading.Thread(target=self._serve, name="e5v-engine", daemon=True)
        self._thread.start()

    # --- for callers, from any thread ------------------------------------------------------------

    def submit(self, items: Sequence[Item]) -> "list[Future[Embedded]]":
        """Have items embedded, each with a future of its own, in their order.

        A future that is cancelled before its item went to the device costs no device time. A bad
        item's raises BadItem.

        Raises Overloaded: too much waits, call again later; TooLarge: these alone are more than may
        wait; Draining: nothing more is taken.
        """
        with self._changed:
            self._check_open()
            self._waiting.reserve(len(items))
        answers = [Answer() for _ in items]
        try:
            parts = self._prepare(items, answers)
            with self._changed:
                self._check_open()
                new = self._waiting.accept(parts)
        except BaseException:
            with self._changed:
                self._waiting.items -= len(items)
            raise
        for answer in answers:
            answer.future.add_done_callback(partial(self._left, answer))
        for part in new:
            if part.measured.image is not None:
                self._pool.submit(self._load, part)
        texts = [part for part in new if part.measured.image is None]
        for part in texts:
            part.prepared = self.model.processor.load(part.measured)
        with self._changed:
            for part in texts:
                self._waiting.put(part)
            self._changed.notify_all()
        return [answer.future for answer in answers]

    def warm_up(
        self, shapes: Iterable[BatchShape], on_shape: Callable[[int], None] = lambda done: None
    ) -> None:
        """Compile shapes, and wait for it. Raises what the device call raises."""
        for done, shape in enumerate(shapes, start=1):
            finished: Future[None] = Future()
            with self._changed:
                self._check_open()
                self._to_compile.append((shape, finished))
                self._changed.notify_all()
            finished.result()
            on_shape(done)

    def drain(self, timeout: float) -> bool:
        """Take nothing more, and wait until all is answered, or so many seconds."""
        with self._changed:
            self._draining = True
            return self._changed.wait_for(lambda: self._waiting.items == 0, timeout)

    def close(self) -> None:
        """End the threads; who still waits is told by Draining."""
        with self._changed:
            self._draining = self._ending = True
            self._changed.notify_all()
        self._thread.join()
        self._pool.shutdown(cancel_futures=True)

    @property
    def healthy(self) -> bool:
        """Whether its thread lives and no device call failed."""
        return self.failure is None and self._thread.is_alive()

    @property
    def draining(self) -> bool:
        """Whether nothing more is taken."""
        return self._draining

    @property
    def waiting_items(self) -> int:
        """Items that are not answered yet."""
        return self._waiting.items

    @property
    def waiting_tokens(self) -> int:
        """Tokens that did not go to the device yet."""
        return self._waiting.tokens

    @property
    def is_full(self) -> bool:
        """Whether not even one more item is taken."""
        return self._waiting.is_full

    @property
    def retry_after(self) -> float:
        """Seconds after which there may be room."""
        return self._waiting.retry_after

    @property
    def dimensions(self) -> int:
        """Of a vector."""
        return int(self.model.config.text.hidden_size)

    # --- in the caller's thread ------------------------------------------------------------------

    def _check_open(self) -> None:
        if self.failure is not None:
            raise Draining(_say(self.failure))
        if self._draining or not self._thread.is_alive():
            raise Draining("the server is about to end: nothing more is taken")

    def _prepare(self, items: Sequence[Item], answers: Sequence[Answer]) -> list[Part]:
        """Choose prompts, answer what the cache knows, tokenise the rest."""
        start = time.perf_counter()
        asked = choose_parts(self._prompts, items, answers)
        with self._changed:
            found = {key: self._waiting.cached(key) for key in asked}
        for key, cached in found.items():
            if cached is not None:
                for answer in asked.pop(key).answers:
                    answer.add(*cached)
        parts = tokenise(self.model.processor, asked)
        self._observer.tokenised(time.perf_counter() - start)
        return parts

    def _left(self, answer: Answer, _: "Future[Embedded]") -> None:
        with self._changed:
            self._waiting.leave(answer)
            if self._waiting.items == 0:
                self._changed.notify_all()

    # --- in a decoding thread --------------------------------------------------------------------

    def _load(self, part: Part) -> None:
        if not part.answers:  # everybody has gone
            return
        start = time.perf_counter()
        try:
            part.prepared = self.model.processor.load(part.measured)
        except Exception as error:  # of Pillow's, almost any
            self._fail([part], BadItem(str(error)))
            return
        self._observer.decoded(time.perf_counter() - start)
        with self._changed:
            self._waiting.put(part)
            self._changed.notify_all()

    # --- in the thread that owns the device ------------------------------------------------------

    def _serve(self) -> None:
        try:
            self._run_batches()
            error: Exception = Draining("the server is about to end: nothing more is computed")
        except Exception as failed:  # of the device: of memory, a lost chip, a program of XLA's
            _logger.exception("the device failed: nothing more is computed")
            self.failure = failed
            error = Draining(_say(failed))
        with self._changed:
            parts, jobs = self._waiting.all_parts(), list(self._to_compile)
        self._fail(parts, error)
        for _, finished in jobs:
            finished.set_exception(error)

    def _run_batches(self) -> None:
        running: deque[tuple[list[Part], BatchShape, float, jax.Array]] = deque()
        free = time.monotonic()  # when the device came to be
        while True:
            with self._changed:
                while not (running or len(self._waiting) or self._to_compile or self._ending):
                    self._changed.wait()
                if self._ending:
                    return
                job = self._to_compile.popleft() if self._to_compile and not running else None
                parts, shape = ([], None) if job else self._choose(only_full=bool(running))
            if job is not None:
                self._compile(*job)
            elif shape is not None:
                now = time.monotonic()
                running.append((parts, shape, now, self._start(parts, shape)))
            if running and (shape is None or len(running) == _IN_FLIGHT):
                parts, shape, began, out = running.popleft()
                vectors = np.asarray(out)[: len(parts)]
                ended = time.monotonic()
                self._finish(parts, shape, vectors, began, ended - max(began, free))
                free = ended

    def _compile(self, shape: BatchShape, finished: "Future[None]") -> None:
        try:
            np.asarray(self.model.start(Batch([], shape), []))
        except Exception as error:
            self.failure = error  # before anybody hears of it
            finished.set_exception(error)
            raise
        finished.set_result(None)

    def _choose(self, *, only_full: bool) -> tuple[list[Part], BatchShape | None]:
        """Take from the queue the batch that has the first in line: its parts and its shape.

        With ``only_full``, one that has room for another item waits: more may come until the device
        is free.
        """
        window = {
            id(part.measured): part for part in self._waiting.window(_WINDOW * self.max_tokens)
        }
        if not window:
            return [], None
        first, processor = next(iter(window.values())).measured, self.model.processor
        like = [
            part.measured for part in window.values() if part.measured.shape_key == first.shape_key
        ]
        items, shape = grow_batch(
            like,
            first,
            processor.padded_length,
            max_tokens=self.max_tokens,
            multiple=self.model.runtime.batch_devices,
        )
        if only_full and len(items) == len(like) < self.max_tokens // shape.size:
            return [], None
        parts = [window[id(item)] for item in items]
        self._waiting.start(parts)
        return parts, fitting_shape(shape, len(parts), self.model.statistics.compilations)

    def _start(self, parts: list[Part], shape: BatchShape) -> jax.Array:
        batch = Batch([part.measured for part in parts], shape)
        return self.model.start(batch, [part.prepared for part in parts])

    def _finish(
        self,
        parts: list[Part],
        shape: BatchShape,
        vectors: np.ndarray,
        began: float,
        seconds: float,
    ) -> None:
        tokens = sum(part.measured.length for part in parts)
        queued = [began - part.since for part in parts]
        report = BatchReport(len(parts), tokens, shape.rows * shape.length, queued, seconds)
        unusable = set(find_unusable(vectors).tolist())
        with self._changed:
            speed, waiting = tokens / max(seconds, 1e-6), self._waiting
            waiting.speed = _MEMORY * (waiting.speed or speed) + (1 - _MEMORY) * speed
            finished = [
                (row, part, waiting.finish(part, None if row in unusable else vectors[row].copy()))
                for row, part in enumerate(parts)
            ]
        self._observer.ran(report)
        for row, part, answers in finished:
            for answer in answers:
                if row in unusable:
                    answer.fail(UnusableVector("the model made a vector that is not finite or 0"))
                else:
                    answer.add(vectors[row], part.measured.length)

    def _fail(self, parts: Sequence[Part], error: Exception) -> None:
        for part in parts:
            with self._changed:
                answers = self._waiting.finish(part, None)
            for answer in answers:
                answer.fail(error)


def _say(failure: Exception) -> str:
    """One line; XLA's go on for pages."""
    lines = str(failure).splitlines() or [type(failure).__name__]
    return f"the device failed: {lines[0]}"
