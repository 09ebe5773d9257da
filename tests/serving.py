"""A server on loopback, in this process, over a model that is loaded already."""

import base64
import io
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import uvicorn
from PIL import Image

from e5v_jax import E5V
from e5v_jax.serve.admission import Admission, Bounds
from e5v_jax.serve.app import make_app
from e5v_jax.serve.auth import Keys
from e5v_jax.serve.engine import Engine
from e5v_jax.serve.media import MediaPolicy
from e5v_jax.serve.metrics import Metrics
from e5v_jax.serve.server import describe, listen
from e5v_jax.serve.service import Service

BOUNDS = Bounds(body_bytes=2**20, waiting_bytes=2**24, items=64, seconds=5)
CLIENT = httpx.Client(timeout=30)  # one, as each takes a while to make
NO_KEYS, DEFAULT = Keys(), MediaPolicy()


@contextmanager
def served(
    e5v: E5V | None,
    *,
    keys: Keys = NO_KEYS,
    bounds: Bounds = BOUNDS,
    policy: MediaPolicy = DEFAULT,
    **options: Any,
) -> Iterator[tuple[str, Service]]:
    """The server's address and its service; without a model, one that is still loading."""
    service = Service(Admission(bounds), policy, Metrics())
    if e5v is not None:
        engine = Engine(e5v, observer=service.metrics, **options)
        service.open(engine, describe(e5v, ("tiny", "tiny-too")))
    listening = listen("127.0.0.1", 0)
    config = uvicorn.Config(make_app(service, keys), log_config=None, lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.005)
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", service
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()
        if service.engine is not None:
            service.engine.close()


def data_url(image: Image.Image) -> str:
    """The image as clients send it."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
