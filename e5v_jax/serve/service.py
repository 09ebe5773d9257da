"""From a parsed request to its answer: images read, items embedded, clients that leave let go."""

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager, suppress
from typing import TypeVar

from PIL import Image
from starlette.types import Receive

from e5v_jax.serve.admission import Admission, Held
from e5v_jax.serve.dialects.task import Refusal, ServedModel, Wanted
from e5v_jax.serve.engine import Engine
from e5v_jax.serve.items import Embedded, Item
from e5v_jax.serve.media import MediaError, MediaPolicy, load_image
from e5v_jax.serve.metrics import Metrics
from e5v_jax.serve.waiting import BadItem, Draining, Overloaded, TooLarge

T = TypeVar("T")
_DECODING = 4  # images of all requests that are read at a time
_INSTRUCTION = 8192  # characters of one; some are kept
_INLINE = 4096  # characters that are tokenised in the event loop; more take longer than a thread


class Service:
    """What all routes share: the state of the server, its engine, and its bounds."""

    def __init__(self, admission: Admission, policy: MediaPolicy, metrics: Metrics) -> None:
        """The model is loaded later, in another thread: see :meth:`open`."""
        self.admission, self.policy, self.metrics = admission, policy, metrics
        self.engine: Engine | None = None
        self.model: ServedModel | None = None
        self.draining = False
        self.working_requests = 0
        self._compiled = 0  # programs, when it became ready
        self._reading = asyncio.Semaphore(_DECODING)
        metrics.watch("e5v_queue_items", "Items not answered yet.", lambda: self._waiting()[0])
        metrics.watch("e5v_queue_tokens", "Tokens not computed yet.", lambda: self._waiting()[1])
        metrics.watch("e5v_held_bytes", "Bodies and images in memory.", lambda: admission.bytes)
        metrics.watch("e5v_compilations", "Programs compiled.", lambda: self.compilations)
        metrics.watch(
            "e5v_compilations_after_ready",
            "Programs compiled while requests waited; declare their shapes.",
            lambda: self.compilations - self._compiled if self.engine else 0,
        )

    def open(self, engine: Engine, model: ServedModel) -> None:
        """Take requests from now on: model and shapes are ready."""
        self._compiled = len(engine.model.statistics.compilations)
        self.model, self.engine = model, engine

    @property
    def compilations(self) -> int:
        """Programs compiled so far."""
        return len(self.engine.model.statistics.compilations) if self.engine else 0

    @property
    def alive(self) -> bool:
        """Whether no device call has failed; while the model is loaded, too."""
        return self.engine is None or self.engine.healthy

    @property
    def ready(self) -> bool:
        """Whether requests are taken."""
        return self.engine is not None and self.alive and not self.draining

    def opened(self) -> tuple[Engine, ServedModel]:
        """Engine and model. Raises Refusal (503): there is none yet, or none any more."""
        if self.draining:
            raise Refusal(503, "the server is about to end", retry_after=1)
        if self.engine is None or self.model is None:
            raise Refusal(503, "the model is being loaded", retry_after=10)
        if not self.engine.healthy:
            raise Refusal(503, "the device failed: this server computes nothing more")
        return self.engine, self.model

    @asynccontextmanager
    async def working(self) -> AsyncIterator[None]:
        """Count a request that is being answered."""
        self.working_requests += 1
        try:
            yield
        finally:
            self.working_requests -= 1

    async def embed(self, wanted: Sequence[Wanted], held: Held) -> list[Embedded]:
        """Embed what a request wants, in its order; cancelled, it lets the engine know.

        Raises Refusal: a bad item, by its field; too much waits; nothing is taken any more.
        """
        engine, model = self.opened()
        self.admission.check_items(len(wanted))
        for one in wanted:
            model.check_text(one.text, field=one.field)
            if len(one.instruction or "") > _INSTRUCTION:
                raise Refusal(400, f"more than {_INSTRUCTION} characters", field="instruction")
        items = await self._to_items(wanted, held)
        length = sum(len(one.text or "") for one in wanted)
        try:
            if length > _INLINE or len(items) > 16:
                futures = await _submit(engine, items)
            else:
                futures = engine.submit(items)
        except Overloaded as error:
            raise Refusal(429, str(error), retry_after=error.retry_after) from None
        except TooLarge as error:
            raise Refusal(413, str(error)) from None
        except Draining as error:
            raise Refusal(503, str(error), retry_after=1) from None
        try:
            await _all_done(futures)
        finally:
            for future in futures:
                future.cancel()
        for one, future in zip(wanted, futures, strict=True):  # a failed one ends the rest
            if future.done() and not future.cancelled() and (cause := future.exception()):
                raise _refusal(one, cause)
        return [future.result() for future in futures]

    async def _to_items(self, wanted: Sequence[Wanted], held: Held) -> list[Item]:
        if all(one.image is None for one in wanted):
            return [_item(one) for one in wanted]
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._to_item(one, held)) for one in wanted]
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _to_item(self, one: Wanted, held: Held) -> Item:
        if one.image is None:
            return _item(one)
        async with self._reading:
            try:
                image, digest = await load_image(one.image, self.policy)
            except MediaError as error:
                raise Refusal(error.status, error.reason, field=one.field) from None
            held.add(3 * image.width * image.height, one.field)
        return _item(one, image, digest)

    def _waiting(self) -> tuple[int, int]:
        engine = self.engine
        return (engine.waiting_items, engine.waiting_tokens) if engine else (0, 0)


async def _submit(engine: Engine, items: Sequence[Item]) -> "list[Future[Embedded]]":
    """Submit in a thread; who is cancelled meanwhile leaves nothing behind."""
    submitting = asyncio.ensure_future(asyncio.to_thread(engine.submit, items))

    def let_go(done: "asyncio.Future[list[Future[Embedded]]]") -> None:
        for future in done.result() if done.exception() is None else ():
            future.cancel()

    try:
        return await asyncio.shield(submitting)
    except asyncio.CancelledError:
        submitting.add_done_callback(let_go)
        raise


def _item(one: Wanted, image: Image.Image | None = None, digest: str | None = None) -> Item:
    return Item(
        text=one.text,
        image=image,
        prompt_name=one.prompt_name,
        instruction=one.instruction,
        truncate=one.truncate,
        max_length=one.max_length,
        image_digest=digest,
    )


def _refusal(one: Wanted, error: BaseException) -> BaseException:
    if isinstance(error, BadItem):
        return Refusal(400, str(error), field=one.field)
    if isinstance(error, Draining):
        return Refusal(503, str(error), retry_after=1)
    return error


async def _all_done(futures: "Sequence[Future[Embedded]]") -> None:
    """Wait until all are done, or one has failed."""
    loop, done = asyncio.get_running_loop(), asyncio.Event()
    missing, lock = len(futures), threading.Lock()

    def tell(future: "Future[Embedded]") -> None:  # in the engine's thread, mostly
        nonlocal missing
        with lock:
            missing -= 1
            last = missing == 0
        if last or (not future.cancelled() and future.exception() is not None):
            with suppress(RuntimeError):  # the loop has ended, nobody waits
                loop.call_soon_threadsafe(done.set)

    for future in futures:
        future.add_done_callback(tell)
    await done.wait()


async def unless_gone(receive: Receive, work: Awaitable[T]) -> T:
    """The result of ``work``, which is cancelled when the client has gone.

    Raises Refusal (499, which nobody reads).
    """

    async def wait_for_end() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(wait_for_end())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise Refusal(499, "the client has gone")
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)
