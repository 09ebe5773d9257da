"""An internet of one process: names that resolve as told, and one server at every address."""

import asyncio
import ssl
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httpcore

from e5v_jax.serve.policy import MediaPolicy
from e5v_jax.serve.remote import Network, fetch

PUBLIC = "93.184.215.14"
POLICY = MediaPolicy(
    allowed_hosts=frozenset({"images.test", "images.test:8443", "other.test"}),
    max_bytes=100_000,
    max_pixels=10_000,
    timeout_s=2.0,
    max_redirects=2,
)
Answer = Callable[[asyncio.StreamWriter], Awaitable[None]]
T = TypeVar("T")


@dataclass
class Internet(httpcore.AsyncNetworkBackend):
    """Every address leads to one server, which answers by host and path what ``pages`` has."""

    pages: dict[str, bytes | Answer]
    """By ``host/path``: the whole answer, or what writes it."""
    names: dict[str, list[Sequence[str]]] = field(default_factory=dict)
    """The answers of the name server, in turn; the last stays. By default ``PUBLIC``."""
    tls: ssl.SSLContext | None = None
    """The server's; None speaks plain HTTP at any port."""
    trust: Callable[[], ssl.SSLContext] = ssl.create_default_context
    """The client's."""
    asked: list[str] = field(default_factory=list)
    """Names that were resolved."""
    connected: list[tuple[str, int]] = field(default_factory=list)
    """Addresses and ports that were connected to."""
    requests: list[str] = field(default_factory=list)
    """``host/path`` of each request, and its headers."""
    port: int = 0

    async def resolve(self, host: str, port: int) -> Sequence[str]:
        self.asked.append(host)
        answers = self.names.get(host, [[PUBLIC]])
        return answers.pop(0) if len(answers) > 1 else answers[0]

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        self.connected.append((host, port))
        if host.endswith(".1"):  # nobody there
            raise httpcore.ConnectError
        return await httpcore.AnyIOBackend().connect_tcp("127.0.0.1", self.port, timeout=timeout)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            path = head.split()[1]
            host = next(line[6:] for line in head.splitlines() if line.lower().startswith("host: "))
            self.requests.append(f"{host}{path}\n{head}")
            answer = self.pages[f"{host}{path}"]
            if callable(answer):
                await answer(writer)
            else:
                writer.write(answer)
            await writer.drain()
        except (OSError, asyncio.IncompleteReadError, ssl.SSLError):
            pass  # the client has gone
        finally:
            writer.close()

    async def use(self, job: Callable[[Network], Coroutine[Any, Any, T]]) -> T:
        """Run ``job`` while the server is up."""
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self.tls)
        self.port = server.sockets[0].getsockname()[1]
        try:
            return await job(Network(self.resolve, self, self.trust))
        finally:
            server.close()

    def fetch(self, url: str, policy: MediaPolicy = POLICY) -> bytes:
        return asyncio.run(self.use(lambda network: fetch(url, policy, network)))


def ok(body: bytes, *headers: str) -> bytes:
    lines = ["HTTP/1.1 200 OK", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


def redirect(location: str, status: int = 302) -> bytes:
    head = f"HTTP/1.1 {status} Found\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n"
    return head.encode("latin-1")


async def drip(writer: asyncio.StreamWriter) -> None:
    """An answer without end or length, a byte at a time: no single read takes long."""
    writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
    while not writer.is_closing():
        writer.write(b"x")
        await writer.drain()
        await asyncio.sleep(0.02)


async def flood(writer: asyncio.StreamWriter) -> None:
    """An answer without end or length, as fast as it is read."""
    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    while not writer.is_closing():
        writer.write(b"4000\r\n" + bytes(0x4000) + b"\r\n")
        await writer.drain()


async def slow_head(writer: asyncio.StreamWriter) -> None:
    """The head of an answer that never ends."""
    while not writer.is_closing():
        writer.write(b"X")
        await writer.drain()
        await asyncio.sleep(0.02)
