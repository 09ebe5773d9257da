"""What the server does beside answering: refusals, keys, probes, metrics, logs, clients that go."""

import asyncio
import json
import logging
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from hf_models import NORM, Case, changed, picture
from serving import BOUNDS, CLIENT, data_url, served

from e5v_jax import E5V
from e5v_jax.serve.admission import Bounds
from e5v_jax.serve.auth import Keys
from e5v_jax.serve.logs import JsonFormatter, choose_id

EMBED = "/v1/embeddings"


@pytest.fixture(scope="module")
def e5v(llava: Callable[[str], Case]) -> E5V:
    return llava("llama-gqa").e5v


class Gate:
    """A device that waits to be let through."""

    def __init__(self, e5v: E5V, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entered, self.open, self._start = threading.Event(), threading.Event(), e5v.start
        self.items = 0
        monkeypatch.setattr(e5v, "start", self)

    def __call__(self, batch: Any, prepared: Any) -> Any:
        self.items += len(batch.items)
        self.entered.set()
        assert self.open.wait(20)
        return self._start(batch, prepared)


@pytest.fixture
def gate(e5v: E5V, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(e5v, monkeypatch)
    yield gate
    gate.open.set()


def post(base: str, text: str = "a", **options: Any) -> httpx.Response:
    return CLIENT.post(base + EMBED, json={"input": text}, timeout=20, **options)


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


# --- states --------------------------------------------------------------------------------------


def test_while_loading() -> None:
    """It lives and is not ready; requests are told when to come again, in their dialect."""
    with served(None) as (base, _):
        assert CLIENT.get(f"{base}/live").status_code == 200
        assert CLIENT.get(f"{base}/ready").status_code == 503
        answer = post(base)
        assert answer.status_code == 503 and answer.headers["retry-after"] == "10"
        assert answer.json()["error"]["type"] == "server_error"
        assert CLIENT.get(f"{base}/v1/models").status_code == 503
        answer = CLIENT.post(f"{base}/v2/embed", json={})
        assert answer.status_code == 503 and "being loaded" in answer.json()["message"]
        assert "e5v_queue_items 0.0" in CLIENT.get(f"{base}/metrics").text


def test_draining(e5v: E5V, gate: Gate) -> None:
    """What waits is answered, nothing new is taken, and it is not ready."""
    with served(e5v) as (base, service):
        answers: list[httpx.Response] = []
        asking = threading.Thread(target=lambda: answers.append(post(base)))
        asking.start()
        assert gate.entered.wait(20)
        service.draining = True
        assert CLIENT.get(f"{base}/ready").status_code == 503
        assert CLIENT.get(f"{base}/live").status_code == 200
        late = post(base, "late")
        assert late.status_code == 503 and late.headers["retry-after"] == "1"
        gate.open.set()
        asking.join(20)
        assert answers[0].status_code == 200


def test_a_failing_device(e5v: E5V, monkeypatch: pytest.MonkeyPatch) -> None:
    """503 at once for who waits and for who comes; /live says that only a restart helps."""

    def fail(*_: Any) -> None:
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory\nand pages more")

    with served(e5v) as (base, _):
        assert post(base).status_code == 200
        monkeypatch.setattr(e5v, "start", fail)
        answer = post(base, "b")
        assert answer.status_code == 503
        assert "the device failed: RESOURCE_EXHAUSTED: out of memory" in answer.text
        assert "pages" not in answer.text
        assert CLIENT.get(f"{base}/live").status_code == 503
        assert CLIENT.get(f"{base}/ready").status_code == 503
        assert post(base, "c").status_code == 503


def test_an_unusable_vector(e5v: E5V, caplog: pytest.LogCaptureFixture) -> None:
    """500, a line in the log under the request's id, and no vector."""
    with served(e5v) as (base, _), changed(e5v, NORM, lambda scale: scale * np.nan):
        answer = post(base, headers={"x-request-id": "mine"})
        assert answer.status_code == 500 and "under mine" in answer.json()["error"]["message"]
    (record,) = (r for r in caplog.records if r.exc_info)
    assert record.exc_info is not None and "not finite" in str(record.exc_info[1])


# --- refusals ------------------------------------------------------------------------------------


def test_overload(e5v: E5V, gate: Gate) -> None:
    """More than may wait is refused at once, and those that wait are answered."""
    with served(e5v, max_waiting_items=4) as (base, service):
        answers: list[httpx.Response] = []

        def ask(text: str) -> None:
            answers.append(post(base, text))

        asking = [threading.Thread(target=ask, args=(f"text {i}",)) for i in range(4)]
        for thread in asking:
            thread.start()
        until(lambda: service.engine is not None and service.engine.waiting_items == 4)
        start = time.monotonic()
        refused = [post(base, "more") for _ in range(5)]
        assert (time.monotonic() - start) / 5 < 0.5
        assert {answer.status_code for answer in refused} == {429}
        assert int(refused[0].headers["retry-after"]) >= 1
        assert refused[0].json()["error"]["type"] == "rate_limit_error"
        gate.open.set()
        for thread in asking:
            thread.join(20)
        assert [answer.status_code for answer in answers] == [200] * 4
        assert post(base, "more").status_code == 200
        many = CLIENT.post(base + EMBED, json={"input": ["a"] * 5})
        assert many.status_code == 413 and "5 items at once, at most 4" in many.text


def test_large_and_slow_bodies(e5v: E5V) -> None:
    bounds = Bounds(body_bytes=2000, waiting_bytes=5000, items=8, seconds=0.3)
    with served(e5v, bounds=bounds) as (base, service):
        assert post(base, "x" * 3000).status_code == 413

        def chunks(count: int) -> Iterator[bytes]:
            yield b'{"input": "'
            for _ in range(count):
                yield b"x" * 100
            yield b'"}'

        for count, status in ((3, 200), (40, 413)):
            answer = CLIENT.post(base + EMBED, content=chunks(count))
            assert answer.status_code == status

        def slow() -> Iterator[bytes]:
            yield b'{"input": '
            time.sleep(0.6)
            yield b'"a"}'

        answer = CLIENT.post(base + EMBED, content=slow())
        assert answer.status_code == 408 and "did not arrive in 0.3 seconds" in answer.text
        host, port = base.removeprefix("http://").split(":")
        for head in ("Content-Length: 99999999999999999999999", "Content-Length: 1999"):
            with socket.create_connection((host, int(port)), timeout=5) as raw:
                raw.sendall(f"POST {EMBED} HTTP/1.1\r\nHost: x\r\n{head}\r\n\r\n{{".encode())
        until(lambda: service.admission.bytes == 0)
        assert post(base).status_code == 200


def test_what_is_held_is_bounded_and_given_back(e5v: E5V) -> None:
    """Of decoded images by their pixels: one too many is refused, alone or beside others."""
    bounds = Bounds(body_bytes=2**20, waiting_bytes=60_000, items=8, seconds=5)
    small = data_url(picture(28, 56))
    with served(e5v, bounds=bounds) as (base, service):
        for image, status in ((data_url(picture(150, 150)), 413), (small, 200), ("x", 400)):
            body = {"input": [{"image": image}, {"text": "a"}, {"image": small}]}
            answer = CLIENT.post(base + EMBED, json=body, timeout=20)
            assert answer.status_code == status, answer.text
            assert service.admission.bytes == 0
        assert "input[0]" in answer.json()["detail"]


def test_departed_clients_cost_nothing(e5v: E5V, gate: Gate) -> None:
    """Who leaves before the device was free for him is forgotten."""

    async def leave(base: str) -> None:
        async with httpx.AsyncClient() as client:
            for count in (1, 20):  # in the event loop, and in a thread
                body = {"input": [f"gone {i}" for i in range(count)]}
                with pytest.raises(httpx.ReadTimeout):
                    await client.post(base + EMBED, json=body, timeout=0.3)

    with served(e5v) as (base, service):
        assert service.engine is not None
        answers: list[httpx.Response] = []
        asking = threading.Thread(target=lambda: answers.append(post(base, "stays")))
        asking.start()
        assert gate.entered.wait(20)
        asyncio.run(leave(base))
        until(lambda: service.engine is not None and service.engine.waiting_items == 1)
        gate.open.set()
        asking.join(20)
        assert answers[0].status_code == 200 and gate.items == 1
        until(lambda: service.working_requests == service.admission.bytes == 0)


# --- keys ----------------------------------------------------------------------------------------


def test_keys(e5v: E5V, tmp_path: Path) -> None:
    """One of the file's opens everything; without, only the probes answer."""
    file = tmp_path / "keys"
    file.write_text("# of a\nfirst-key\n\n second-key \n")
    with served(e5v, keys=Keys.from_file(file)) as (base, _):
        for key in ("first-key", "second-key"):
            assert post(base, headers={"authorization": f"Bearer {key}"}).status_code == 200
        for headers in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": "first-key"},
            {"authorization": "Basic first-key"},
            {"authorization": "Bearer"},
            {"authorization": "Bearer # of a"},
            {"authorization": "Bearer \u00e9".encode("latin-1")},
        ):
            answer = post(base, headers=headers)
            assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
            assert answer.json()["error"]["code"] == "invalid_api_key"
        for path in ("/metrics", "/v1/models", "/nothing"):
            assert CLIENT.get(base + path).status_code == 401
        for path in ("/live", "/ready"):
            assert CLIENT.get(base + path).status_code == 200
        assert "message" in CLIENT.post(f"{base}/v2/embed").json()


def test_key_files(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    for content, words in ((b"\n#x\n", "no key there"), (b"\xff\n", "other characters than ASCII")):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=words):
            Keys.from_file(file)


# --- what is told --------------------------------------------------------------------------------


def test_metrics(e5v: E5V) -> None:
    with served(e5v) as (base, _):
        for text in ("metrics", "metrics", ""):
            post(base, text)
        CLIENT.get(f"{base}/nothing")
        text = CLIENT.get(f"{base}/metrics").text
        values = dict(re.findall(r"(?m)^([^#\s]\S*) (\S+)$", text))
    assert float(values['e5v_requests_total{route="/v1/embeddings",status="200"}']) == 2
    assert float(values['e5v_requests_total{route="/v1/embeddings",status="400"}']) == 1
    assert float(values['e5v_requests_total{route="other",status="404"}']) == 1
    assert float(values["e5v_batch_items_sum"]) == float(values["e5v_device_seconds_count"]) == 2
    assert float(values["e5v_batch_tokens_sum"]) > 100
    assert float(values["e5v_queue_seconds_count"]) == 2
    assert float(values["e5v_tokenize_seconds_count"]) == 3
    assert float(values["e5v_padding_tokens_total"]) >= 0
    for name in ("e5v_queue_items", "e5v_queue_tokens", "e5v_held_bytes"):
        assert float(values[name]) == 0
    assert float(values["e5v_compilations_after_ready"]) <= float(values["e5v_compilations"])


def test_logs_and_request_ids(e5v: E5V, caplog: pytest.LogCaptureFixture) -> None:
    """A line a request, as JSON, under the id that the client gave or is given."""
    caplog.set_level(logging.INFO, "e5v_jax")
    with served(e5v) as (base, _):
        assert post(base, headers={"x-request-id": "job-1/7"}).headers["x-request-id"] == "job-1/7"
        strange = post(base, " ", headers={"x-request-id": 'a"b c'}).headers["x-request-id"]
        assert re.fullmatch(r"[0-9a-f]{32}", strange)
        until(lambda: sum(r.message == "answered" for r in caplog.records) == 2)
    lines = [r for r in caplog.records if r.message == "answered"]
    entries = [json.loads(JsonFormatter().format(r)) for r in lines]
    assert [entry["status"] for entry in entries] == [200, 400]
    assert entries[0]["items"] == 1 and entries[0]["tokens"] > 10
    assert entries[1]["error"].startswith("input: the text is empty")
    assert {entry["path"] for entry in entries} == {EMBED}
    assert choose_id("a\nb") != "a\nb" and choose_id("x" * 200) != "x" * 200
    try:
        raise ValueError("several\nlines")
    except ValueError as error:
        record = logging.LogRecord("n", 40, "p", 1, "it %s", ("failed",), (ValueError, error, None))
    line = JsonFormatter().format(record)
    assert "\n" not in line and "several" in json.loads(line)["traceback"]


def test_unknown_paths(e5v: E5V) -> None:
    with served(e5v, bounds=BOUNDS) as (base, _):
        answer = CLIENT.get(f"{base}/v1/nothing")
        assert answer.status_code == 404 and answer.json()["error"]["message"]
        answer = CLIENT.get(base + EMBED)
        assert answer.status_code == 405 and answer.headers["allow"] == "POST"
        models = CLIENT.get(f"{base}/v1/models").json()["data"]
        assert models[0]["dimensions"] == 64 and models[0]["modalities"] == ["text", "image"]
