"""What goes wrong around a server: clients that leave, that are slow, and a server that is killed.

Whatever comes, an answer has the right vectors or there is none, and nothing is held for those who
have gone.
"""

import asyncio
import json
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from mixed_load import TOLERANCE, Answers, MixedLoad, Tally, right_answers
from serve_load import EMBEDDINGS, Client, Server, serving, start

from e5v_jax import E5V

if TYPE_CHECKING:
    from hf_models import Case

pytestmark = pytest.mark.slow  # and it waits: on a busy machine others would wait for it

TEXTS = [f"{number} dogs run {'very ' * (number % 7)}fast." for number in range(40)]
FLAGS = ("--dtype", "float32", "--cache-size", "8", "--warm-up-text", "0", "--body-seconds", "2")
GONE = {"e5v_queue_items": 0.0, "e5v_queue_tokens": 0.0, "e5v_held_bytes": 0.0}


@pytest.fixture(scope="module")
def model(llava: "Callable[[str], Case]") -> Path:
    return llava("llama-gqa").folder


@pytest.fixture(scope="module")
def answers(model: Path) -> Answers:
    return right_answers(E5V.from_pretrained(model, dtype="float32"), TEXTS)


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(model, tmp_path_factory.mktemp("serve") / "log", *FLAGS) as running:
        yield running


def check_right(server: Server, answers: Answers) -> None:
    reply = asyncio.run(Client(server.port).post({"input": TEXTS[:3]}))
    assert reply.status == 200, reply.body
    np.testing.assert_allclose(reply.vectors, answers.text_vectors[:3], atol=TOLERANCE, rtol=0)


def check_free(server: Server, seconds: float = 10.0) -> None:
    """Nothing is held for anybody, now or soon."""
    deadline = time.monotonic() + seconds
    while (found := {name: server.metrics()[name] for name in GONE}) != GONE:
        assert time.monotonic() < deadline, found
        time.sleep(0.05)


def check_tally(tally: Tally, *, broken: bool = False) -> None:
    assert not tally.wrong, tally.wrong[:5]
    assert sum(tally.vectors.values()) > 0
    assert set(tally.bad) <= {400, 404, 413, 422} | ({503} if broken else set())
    assert broken or not (tally.broken or tally.refused)


def test_a_mixed_load(server: Server, answers: Answers) -> None:
    """Texts, images, both, bad requests and clients that go: every vector is the right one."""
    load = MixedLoad(answers)
    kinds, tally = {"texts", "one text", "images", "messages"}, load.tally

    async def until_all_came() -> None:
        sending = asyncio.create_task(load.run(server.port, 120.0))
        await asyncio.sleep(4.0)
        while not sending.done():
            load.ending = set(tally.vectors) == kinds and min(tally.bad.total(), tally.left) > 5
            await asyncio.sleep(0.1)
        await sending

    asyncio.run(until_all_came())
    check_tally(tally)
    assert set(tally.vectors) == kinds
    assert tally.bad.total() > 5 and tally.left > 5
    check_free(server)
    assert server.status("/live") == 200


def test_clients_that_leave_cost_no_device_time(server: Server, answers: Answers) -> None:
    """A long queue of clients that have gone is dropped, and not computed."""
    before = server.metrics()["e5v_batch_items_sum"]
    asked = 400

    async def leave() -> None:
        clients = [Client(server.port) for _ in range(asked)]
        for number, client in enumerate(clients):
            text = f"{number}: " + "who have gone " * 100  # takes the device longer than the client
            await client.send(json.dumps({"input": text}).encode())
        for client in clients:
            client.close()

    asyncio.run(leave())
    check_free(server)
    assert server.metrics()["e5v_batch_items_sum"] - before < asked / 2
    check_right(server, answers)


def test_clients_that_leave_at_any_moment(server: Server, answers: Answers) -> None:
    """After any byte of a request, and after any part of the answer."""
    body = json.dumps({"input": TEXTS[:5]}).encode()
    head = f"POST {EMBEDDINGS} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    request = head + body
    for end in [*range(1, len(request), 23), len(request)]:
        with socket.create_connection(("127.0.0.1", server.port)) as one:
            one.sendall(request[:end])
    for count in (1, 10, 100, 1000):
        with socket.create_connection(("127.0.0.1", server.port)) as one:
            one.sendall(request)
            assert one.recv(count)
    check_free(server)
    check_right(server, answers)


def test_bodies_that_never_end(server: Server, answers: Answers) -> None:
    """Connections that send a byte now and then are ended; others are answered meanwhile."""
    sockets = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(50)]
    for one in sockets:
        one.sendall(
            f"POST {EMBEDDINGS} HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n{{".encode()
        )
    begin = time.monotonic()
    check_right(server, answers)
    assert time.monotonic() - begin < 1.5  # before they are ended
    assert server.metrics()["e5v_held_bytes"] == 50_000
    while time.monotonic() - begin < 1.5:
        for one in sockets:
            one.sendall(b" ")
        time.sleep(0.25)
    for one in sockets:
        one.settimeout(5)
        assert one.recv(12) == b"HTTP/1.1 408"
        one.close()
    check_free(server)


def test_clients_that_do_not_read(server: Server, answers: Answers) -> None:
    """Answers of megabytes that nobody takes hold up nobody else."""
    body = json.dumps({"input": [TEXTS[i % 40] for i in range(2000)]}).encode()
    head = f"POST {EMBEDDINGS} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    sockets = []
    for _ in range(10):
        one = socket.socket()
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        one.connect(("127.0.0.1", server.port))
        one.sendall(head + body)
        assert one.recv(12) == b"HTTP/1.1 200"
        sockets.append(one)
    begin = time.monotonic()
    for _ in range(5):
        check_right(server, answers)
    assert time.monotonic() - begin < 2
    (last,) = sockets[-1:]  # it reads now, and has all of it
    last.settimeout(20)
    text = b""
    while b"\r\n\r\n" not in text or len(text) < text.index(b"\r\n\r\n") + 4 + _length(text):
        part = last.recv(65536)
        assert part
        text += part
    assert len(json.loads(text.partition(b"\r\n\r\n")[2])["data"]) == 2000
    for one in sockets:
        one.close()
    check_free(server)
    check_right(server, answers)


def _length(answer: bytes) -> int:
    head = answer.partition(b"\r\n\r\n")[0].lower().decode()
    return int(next(line for line in head.splitlines() if "content-length" in line).split(":")[1])


class Background:
    """A load that goes on until it is told to end."""

    def __init__(self, load: MixedLoad, port: int) -> None:
        self.load, self.right = load, sum(load.tally.vectors.values())
        self.thread = threading.Thread(
            target=lambda: asyncio.run(load.run(port, 300.0)), daemon=True
        )
        self.thread.start()

    def wait_for_answers(self, count: int) -> None:
        deadline = time.monotonic() + 120
        while sum(self.load.tally.vectors.values()) < self.right + count:
            assert time.monotonic() < deadline and self.thread.is_alive()
            time.sleep(0.02)

    def end(self) -> None:
        self.load.ending = True
        self.thread.join(90)
        assert not self.thread.is_alive()
        self.load.ending = False


@pytest.mark.slow
def test_kills_and_restarts(model: Path, answers: Answers, tmp_path: Path) -> None:
    """kill -9 under load, five times: clients see errors, never a wrong vector, and are served
    again by the server that is started next on the same port.
    """
    log = tmp_path / "log"
    server = start(model, log, *FLAGS)
    load = MixedLoad(answers)
    try:
        for kill in range(5):
            server.wait_until_ready()
            broken = load.tally.broken
            running = Background(load, server.port)
            running.wait_for_answers(20 + 33 * kill)
            server.kill()
            time.sleep(0.3)
            running.end()
            assert load.tally.broken > broken
            server = start(model, log, *FLAGS, port=server.port)
            if kill % 2:  # who asks while the model is loaded is refused, and then answered
                running = Background(load, server.port)
                running.wait_for_answers(20)
                running.end()
        server.wait_until_ready()
        check_tally(load.tally, broken=True)
        assert set(load.tally.refused) == {503}
        check_right(server, answers)
        check_free(server)
    finally:
        server.kill()


@pytest.mark.slow
def test_the_end_under_load(model: Path, answers: Answers, tmp_path: Path) -> None:
    """SIGTERM under load: what was taken is answered, the rest is refused, the exit code is 0."""
    server = start(model, tmp_path / "log", *FLAGS)
    load = MixedLoad(answers, leave=False, bad=False)
    try:
        server.wait_until_ready()
        running = Background(load, server.port)
        running.wait_for_answers(50)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(40) == 0
        running.end()
        check_tally(load.tally, broken=True)
        assert set(load.tally.refused) <= {503}
    finally:
        server.kill()
