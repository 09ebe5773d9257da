"""The server process: it listens at once, loads the model meanwhile, and drains at SIGTERM."""

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from types import FrameType

import jax
import uvicorn

from e5v_jax.cli import UsageError
from e5v_jax.encode.e5v import E5V
from e5v_jax.families.base import Processor
from e5v_jax.serve.admission import Admission, Bounds
from e5v_jax.serve.app import make_app
from e5v_jax.serve.auth import Keys
from e5v_jax.serve.dialects.task import ServedModel
from e5v_jax.serve.engine import Engine
from e5v_jax.serve.logs import log_as_json
from e5v_jax.serve.media import MediaPolicy
from e5v_jax.serve.metrics import Metrics
from e5v_jax.serve.options import Args
from e5v_jax.serve.service import Service
from e5v_jax.serve.shapes import declare_shapes, read_size

_NICENESS = 5  # a third of the event loop's share of a core that both want
_logger = logging.getLogger("e5v_jax")


class Server(uvicorn.Server):
    """uvicorn's server, which at the first signal takes nothing more and answers what waits."""

    def __init__(self, config: uvicorn.Config, service: Service, drain_seconds: float) -> None:
        """The server ends when ``service`` has nothing to do, or so long after the signal."""
        super().__init__(config)
        self._service, self._drain_seconds = service, drain_seconds
        self._deadline: float | None = None
        self.received: int | None = None  # the first signal

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain at the first signal, end at once at the second."""
        if self.received is None:
            self.received, self._service.draining = sig, True
            self._deadline = time.monotonic() + self._drain_seconds
        else:
            self.should_exit = self.force_exit = True

    async def on_tick(self, counter: int) -> bool:
        """End when nothing is left to answer; uvicorn asks ten times a second."""
        if self._deadline is not None:
            idle = self._service.working_requests == 0
            if idle or time.monotonic() > self._deadline:
                self.should_exit = True
        return await super().on_tick(counter)


def run_server(args: Args) -> None:
    """Answer requests until a signal comes.

    Raises UsageError: a bad flag; OSError, ValueError: a file or the model cannot be read, or the
    address is taken; KeyboardInterrupt: the signal was Ctrl-C.
    """
    keys = Keys() if args.api_key_file is None else Keys.from_file(args.api_key_file)
    try:
        sizes = [read_size(text) for text in args.warm_up_image]
        policy = MediaPolicy(
            allowed_hosts=frozenset(args.allow_media_host),
            max_bytes=args.max_image_bytes,
            max_pixels=args.max_image_pixels,
            timeout_s=args.media_seconds,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    log_as_json()
    bounds = Bounds(
        args.max_body_bytes, args.max_waiting_bytes, args.max_request_items, args.body_seconds
    )
    service = Service(Admission(bounds), policy, Metrics())
    with listen(args.host, args.port) as listening:
        config = uvicorn.Config(
            make_app(service, keys),
            log_config=None,
            access_log=False,
            lifespan="off",
            server_header=False,
            timeout_graceful_shutdown=max(1, round(args.drain_seconds)),
        )
        server = Server(config, service, args.drain_seconds)
        failures: list[BaseException] = []

        def load() -> None:
            try:
                open_service(args, service, sizes)
            except BaseException as error:  # raised below, in the main thread
                failures.append(error)
                server.should_exit = True

        if threading.current_thread() is threading.main_thread():
            # uvicorn has it so while it runs; the signal may come before
            signal.signal(signal.SIGTERM, server.handle_exit)
        loading = threading.Thread(target=load, name="e5v-load", daemon=True)
        address = listening.getsockname()
        _logger.info("listening", extra={"fields": {"host": address[0], "port": address[1]}})
        loading.start()
        server.run(sockets=[listening])
    if failures:
        raise failures[0]
    _logger.info("ended")
    if service.engine is not None:
        service.engine.drain(0)
        service.engine.close()
    if loading.is_alive():  # the interpreter's end would wait for XLA, or crash with it
        sys.stderr.flush()
        os._exit(130 if server.received == signal.SIGINT else 0)
    if server.received == signal.SIGINT:
        raise KeyboardInterrupt


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises OSError, which names the address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise OSError(f"{host}:{port}: {error.strerror or error}") from error


def open_service(args: Args, service: Service, sizes: Sequence[tuple[int, int]]) -> None:
    """Load the model, compile what is declared, and take requests."""
    give_way()
    start = time.perf_counter()
    model = args.load(jax.local_devices())
    engine = Engine(
        model,
        max_waiting_items=args.max_waiting_items,
        max_waiting_tokens=args.max_waiting_tokens,
        max_waiting_bytes=args.max_waiting_bytes,
        cache_size=args.cache_size,
        max_num_batched_tokens=args.max_num_batched_tokens,
        observer=service.metrics,
    )
    shapes = declare_shapes(
        model.processor,
        longest_text=args.warm_up_text,
        images=sizes,
        max_tokens=engine.max_tokens,
        multiple=model.runtime.batch_devices,
    )
    loaded = time.perf_counter()
    engine.warm_up(shapes)
    service.open(engine, describe(model, args.names))
    fields = {
        "model": args.names[0],
        "load_seconds": round(loaded - start, 2),
        "warm_up_seconds": round(time.perf_counter() - loaded, 2),
        "shapes": len(shapes),
    }
    _logger.info("ready", extra={"fields": fields})


def give_way() -> None:
    """Lower the priority of this thread and of those it starts: XLA's on a CPU, and the engine's.

    On all cores busy with a batch, the event loop is then scheduled first: it reads, refuses and
    answers at once. Only Linux has priorities of threads.
    """
    if sys.platform == "linux":
        thread = threading.get_native_id()
        own = os.getpriority(os.PRIO_PROCESS, thread)
        os.setpriority(os.PRIO_PROCESS, thread, min(own + _NICENESS, 19))


def describe(model: E5V, names: tuple[str, ...]) -> ServedModel:
    """What the dialects need to know of a model."""
    processor = model.processor
    return ServedModel(
        names=names,
        dimensions=processor.config.text.hidden_size,
        max_length=processor.longest(None),
        modalities=processor.config.modalities,
        decode=lambda ids: decode_ids(processor, ids),
    )


def decode_ids(processor: Processor, ids: Sequence[int]) -> str:
    """Give the text of token ids; special ones, such as BOS, stand for none of it.

    Raises ValueError: no such id.
    """
    most = len(processor.tokenizer)
    for token in ids:
        if not 0 <= token < most:
            raise ValueError(f"token id {token}, expected 0 to {most - 1}")
    text = processor.tokenizer.decode(
        list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    assert isinstance(text, str)
    return text
