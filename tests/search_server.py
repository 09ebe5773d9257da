"""The search page on a port of this process."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn

from e5v_jax.search.app import make_app
from e5v_jax.search.query import Embed
from e5v_jax.search.server import listen, names_of
from e5v_jax.search.store import Store


@contextmanager
def serving(index: Path, embed: Embed) -> Iterator[str]:
    """Serve an index while the block runs; it gives the address, without a slash at its end."""
    taken, store = listen("127.0.0.1", 0), Store(index)
    app = make_app(store, embed, names_of("127.0.0.1", ()))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    taken.listen()
    thread = threading.Thread(target=server.run, kwargs={"sockets": [taken]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
        assert thread.is_alive()
    try:
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        taken.close()
        store.close()
