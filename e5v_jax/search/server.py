"""The page on a port of this machine, by uvicorn, until Ctrl-C or SIGTERM ends it."""

import errno
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from signal import SIGINT, SIGTERM, signal

import uvicorn

from e5v_jax.search.app import make_app
from e5v_jax.search.query import Embed
from e5v_jax.search.store import Store

_LOOPBACK = ("localhost", "127.0.0.1", "[::1]", "::1")
_ANY = ("0.0.0.0", "::")
_GRACE = 5  # seconds that requests may still take


class _Server(uvicorn.Server):
    """One that ends well at a signal, where uvicorn raises it again."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        before = {number: signal(number, self.handle_exit) for number in (SIGINT, SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal(number, handler)


def listen(host: str, port: int) -> socket.socket:
    """Take a port. Raises OSError: it is taken, or no such address is this machine's."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    taken = socket.socket(family, socket.SOCK_STREAM)
    try:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind((host, port))
    except OSError as error:
        taken.close()
        advice = "; choose another --port" if error.errno == errno.EADDRINUSE else ""
        raise OSError(f"--host {host} --port {port}: {error.strerror}{advice}") from error
    return taken


def names_of(host: str, more: Sequence[str]) -> list[str]:
    """The names that a browser may call a server by that listens on ``host``."""
    names = [*_LOOPBACK, *more]
    if host not in _ANY:
        return [*names, host, f"[{host}]"] if ":" in host else [*names, host]
    own = socket.gethostname()
    with suppress(OSError):
        names += {str(info[4][0]) for info in socket.getaddrinfo(own, None)}
    return [*names, own]


def run_server(
    taken: socket.socket,
    store: Store,
    embed: Embed,
    allow_hosts: Sequence[str],
    on_ready: Callable[[str], None],
) -> None:
    """Serve until a signal ends it; ``on_ready`` hears the address."""
    host, port = taken.getsockname()[:2]
    app = make_app(store, embed, names_of(host, allow_hosts))
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_GRACE,
    )
    shown = "localhost" if host in _ANY else f"[{host}]" if ":" in host else host
    taken.listen(128)
    on_ready(f"http://{shown}:{port}/")
    _Server(config).run(sockets=[taken])
