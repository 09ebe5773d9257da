"""The command as a process: it gets ready, answers, and ends as it is told."""

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import yaml
from hf_models import TEXT_RECIPES, build_text

from e5v_jax import E5V

ROOT = Path(__file__).parents[1]
TEXTS = [f"Text number {i}." for i in range(3)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serve") / "tiny"
    build_text(TEXT_RECIPES["llama"], folder)
    return folder


class Process:
    """A running server."""

    def __init__(self, *flags: str) -> None:
        """Start it, and wait until it listens."""
        command = [sys.executable, "-m", "e5v_jax.serve", "--port", "0", *flags]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE)
        self.lines: list[dict[str, Any]] = []
        self._raw: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        port = self.wait_for("listening")["port"]
        self.base = f"http://127.0.0.1:{port}"

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._raw.append(line.decode())
            if line.startswith(b"{"):
                self.lines.append(json.loads(line))

    def wait_for(self, message: str) -> dict[str, Any]:
        """The line of the log that says so."""
        end = time.monotonic() + 60
        while time.monotonic() < end:
            for line in self.lines:
                if line["message"] == message:
                    return line
            assert self.process.poll() is None, "".join(self._raw)
            time.sleep(0.02)
        raise AssertionError("".join(self._raw))

    def end(self, number: int) -> tuple[int, str]:
        """Its exit code after a signal, and what it wrote."""
        self.process.send_signal(number)
        code = self.process.wait(30)
        self._reader.join(10)
        return code, "".join(self._raw)


@contextmanager
def running(*flags: str) -> Iterator[Process]:
    server = Process(*flags)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
        server.process.wait(10)


def test_from_start_to_sigterm(model: Path, tmp_path: Path) -> None:
    """Not ready, ready, answers under a key, nothing compiled after the warm-up, exit code 0."""
    keys = tmp_path / "keys"
    keys.write_text("secret-1\n")
    flags = ["--model", str(model), "--dtype", "float32", "--api-key-file", str(keys)]
    flags += ["--warm-up-text", "80", "--max-num-batched-tokens", "200"]
    with running(*flags) as server:
        assert httpx.get(f"{server.base}/live").status_code == 200
        early = httpx.get(f"{server.base}/ready")
        assert early.status_code == 503
        ready = server.wait_for("ready")
        assert httpx.get(f"{server.base}/ready").status_code == 200
        assert ready["model"] == "tiny" and ready["shapes"] >= 2
        with httpx.Client(
            base_url=server.base, headers={"authorization": "Bearer secret-1"}, timeout=20
        ) as client:
            body = {"model": "tiny", "input": TEXTS}
            answer = client.post("/v1/embeddings", json=body)
            found = np.array([one["embedding"] for one in answer.json()["data"]])
            expected = E5V.from_pretrained(model, dtype="float32").encode(TEXTS)
            assert np.abs(found - expected).max() <= 1e-6
            image = client.post("/v1/embeddings", json={"input": [{"image": "aGVsbG8="}]})
            assert image.status_code == 400
            metrics = client.get("/metrics").text
            assert "e5v_compilations_after_ready 0.0" in metrics
            assert f"e5v_compilations {ready['shapes']}.0" in metrics
        assert httpx.post(f"{server.base}/v1/embeddings", json=body).status_code == 401
        code, log = server.end(signal.SIGTERM)
    assert code == 0
    for line in log.splitlines():
        assert json.loads(line)["message"]
    assert "secret-1" not in log and json.loads(log.splitlines()[-1])["message"] == "ended"


def test_sigterm_waits_for_what_is_asked(model: Path) -> None:
    """A large request is answered; meanwhile it is not ready and takes nothing more."""
    flags = [
        "--model",
        str(model),
        "--dtype",
        "float32",
        "--warm-up-text",
        "0",
        "--max-num-batched-tokens",
        "100",
    ]
    with running(*flags) as server:
        server.wait_for("ready")
        answers: list[httpx.Response] = []

        def ask() -> None:
            body = {"input": [f"Text {i}" for i in range(200)]}
            answers.append(httpx.post(f"{server.base}/v1/embeddings", json=body, timeout=60))

        asking = threading.Thread(target=ask)
        asking.start()
        end = time.monotonic() + 20
        while "e5v_queue_items 200.0" not in httpx.get(f"{server.base}/metrics").text:
            assert time.monotonic() < end and asking.is_alive()
        server.process.send_signal(signal.SIGTERM)
        statuses = []
        while asking.is_alive():
            try:
                statuses.append(httpx.get(f"{server.base}/ready").status_code)
                late = httpx.post(f"{server.base}/v1/embeddings", json={"input": "late"})
                statuses.append(late.status_code)
            except httpx.TransportError:  # it has ended meanwhile
                break
        asking.join(60)
        assert answers[0].status_code == 200 and len(answers[0].json()["data"]) == 200
        assert server.process.wait(30) == 0
    assert statuses[-1] == 503 and set(statuses[2:]) == {503}


def test_signals_while_loading(model: Path) -> None:
    for number, code in ((signal.SIGTERM, 0), (signal.SIGINT, 130)):
        with running("--model", str(model)) as server:
            assert server.end(number)[0] == code


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--model", "nowhere/model"], 1, "nowhere/model"),
        (["--model", "x", "--port", "70000"], 2, "--port: 70000, expected at most 65535"),
        (["--model", "x", "--max-waiting-items", "0"], 2, "--max-waiting-items: 0, expected"),
        (["--model", "x", "--max-request-items", "9999"], 2, "could never be answered"),
        (["--model", "x", "--warm-up-image", "big"], 2, "'big': expected a width and a height"),
        (["--model", "x", "--allow-media-host", "http://a"], 2, "media host 'http://a'"),
        (["--model", "x", "--api-key-file", "nowhere"], 1, "nowhere: No such file"),
        (["--model", "x", "--host", "256.1.1.1"], 1, "256.1.1.1:0: "),
    ],
)
def test_errors_in_one_line(
    flags: list[str], code: int, words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    from e5v_jax.serve.__main__ import main

    with pytest.raises(SystemExit) as end:
        main([*flags, "--port", "0"] if "--port" not in flags else flags)
    assert end.value.code == code
    (line,) = (x for x in capfd.readouterr().err.splitlines() if not x.startswith("{"))
    assert line.startswith("error: ") and words in line


def test_an_address_that_is_taken(model: Path) -> None:
    from e5v_jax.serve.server import listen

    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"127.0.0.1:{port}: Address already in use"):
            listen("127.0.0.1", port)


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from e5v_jax.serve.command import serve
    from e5v_jax.serve.options import Args

    for name in [name for name in sys.modules if name.startswith("e5v_jax.serve.server")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(ImportError, match=r"pip install 'e5v-jax\[serve\]'"):
        serve(Args(model="x"))


def test_deployment() -> None:
    """What it mounts, asks and copies is there: flags, routes, files."""
    from e5v_jax.serve.options import Args

    for line in (ROOT / "deploy/Dockerfile").read_text().splitlines():
        if line.startswith("COPY"):
            for source in shlex.split(line)[1:-1]:
                assert (ROOT / source).exists(), line
    documents = yaml.safe_load_all((ROOT / "deploy/kubernetes.yaml").read_text())
    pod = next(documents)["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    flags = [word for word in container["args"] if word.startswith("--")]
    assert {flag[2:].replace("-", "_") for flag in flags} <= {f.name for f in fields(Args)}
    drain = float(container["args"][container["args"].index("--drain-seconds") + 1])
    assert drain + 5 < pod["terminationGracePeriodSeconds"]
    probes = [container[f"{name}Probe"]["httpGet"]["path"] for name in ("liveness", "readiness")]
    assert probes == ["/live", "/ready"]
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
