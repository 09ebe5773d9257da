"""A server in a process of its own, and a client that costs almost nothing beside it."""

import asyncio
import base64
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
EMBEDDINGS = "/v1/embeddings"


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def cpu_seconds(process: int) -> float:
    """What the threads of a process took of the CPUs: waiting for others does not count."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@dataclass
class Server:
    """A running ``python -m e5v_jax.serve``."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    def status(self, path: str, seconds: float = 5.0) -> int:
        """Of a GET; 0: nobody answers."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=seconds)
        try:
            connection.request("GET", path)
            return connection.getresponse().status
        except OSError:
            return 0
        finally:
            connection.close()

    def metrics(self) -> dict[str, float]:
        """Every sample by its name and labels, as the page has them."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        connection.request("GET", "/metrics")
        lines = connection.getresponse().read().decode().splitlines()
        connection.close()
        samples = (line.rsplit(" ", 1) for line in lines if line and line[0] != "#")
        return {name: float(value) for name, value in samples}

    def wait_until_ready(self, seconds: float = 400.0) -> None:
        deadline = time.monotonic() + seconds
        while self.status("/ready") != 200:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.2)

    @property
    def cpu_seconds(self) -> float:
        """Of all its threads, so far."""
        return cpu_seconds(self.process.pid)

    @property
    def resident(self) -> int:
        """Bytes of memory."""
        status = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return 1024 * int(next(line for line in status if line.startswith("VmRSS")).split()[1])

    def kill(self) -> None:
        """End it at once, as a lack of memory or power would."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


def start(model: Path, log: Path, *flags: str, port: int | None = None) -> Server:
    """Start a server, which may not be ready yet; what it prints goes to the end of ``log``."""
    port = port or free_port()
    command = [sys.executable, "-m", "e5v_jax.serve", "--model", str(model), "--port", str(port)]
    with log.open("ab") as file:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", *flags],
            stdout=file,
            stderr=file,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
    return Server(process, port, log)


@contextmanager
def serving(model: Path, log: Path, *flags: str) -> Iterator[Server]:
    """A server that is ready; killed at the end if it still runs."""
    server = start(model, log, *flags)
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.kill()


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer of a server."""

    status: int
    headers: dict[str, str]
    body: bytes
    seconds: float

    @property
    def vectors(self) -> np.ndarray:
        """float32 [N, D] of an answer in OpenAI's form, in the order of the indices."""
        data = json.loads(self.body)["data"]
        assert [one["index"] for one in data] == list(range(len(data)))
        return np.stack([_vector(one["embedding"]) for one in data])


def _vector(value: str | list[float]) -> np.ndarray:
    if isinstance(value, str):
        return np.frombuffer(base64.b64decode(value), "<f4")
    return np.asarray(value, np.float32)


class Client:
    """One connection that is kept; not for several tasks at once."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def post(self, payload: object, path: str = EMBEDDINGS) -> Reply:
        """Send JSON, or bytes as they are. Raises OSError, EOFError: the connection ended."""
        body = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
        start = time.perf_counter()
        try:
            reader, _ = await self.send(body, path)
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").splitlines()
            pairs = (line.split(":", 1) for line in head[1:] if line)
            headers = {name.lower(): value.strip() for name, value in pairs}
            answer = await reader.readexactly(int(headers.get("content-length", 0)))
        except BaseException:
            self.close()
            raise
        if headers.get("connection", "").lower() == "close":
            self.close()
        return Reply(int(head[0].split()[1]), headers, answer, time.perf_counter() - start)

    async def send(
        self, body: bytes, path: str = EMBEDDINGS, *, claim: int | None = None
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Send a request, whose head may ``claim`` another length; the answer is not read."""
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self.port)
        reader, writer = self._streams
        length = len(body) if claim is None else claim
        writer.write(
            f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n".encode()
            + body
        )
        await writer.drain()
        return reader, writer

    def close(self) -> None:
        """Close the connection, whatever is on its way."""
        if self._streams is not None:
            with suppress(OSError):
                self._streams[1].transport.abort()
            self._streams = None


async def post_all(port: int, payloads: Sequence[Any], concurrency: int) -> list[Reply]:
    """Send all, so many at a time over as many connections; answers in their order."""
    replies: list[Reply | None] = [None] * len(payloads)
    waiting = iter(range(len(payloads)))

    async def work() -> None:
        client = Client(port)
        for position in waiting:
            replies[position] = await client.post(payloads[position])
        client.close()

    await asyncio.gather(*(work() for _ in range(concurrency)))
    return [reply for reply in replies if reply is not None]
