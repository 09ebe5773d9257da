"""What the search server answers, and what it refuses: by HTTP, and the command itself."""

import base64
import http.client
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image
from search_scenes import TEXTS, draw_scene, embed_scene, embed_scenes, index_scenes

pytest.importorskip("uvicorn", reason="pip install -e '.[search]'")

from search_server import serving

from e5v_jax import E5V
from e5v_jax.data.inputs import Input
from e5v_jax.search.__main__ import main
from e5v_jax.search.app import MAX_BODY
from e5v_jax.search.index import update
from e5v_jax.search.server import listen, names_of
from e5v_jax.search.writer import Writer

if TYPE_CHECKING:
    from hf_models import Case


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("place")
    index_scenes(place)
    return place


@pytest.fixture(scope="module")
def address(place: Path) -> Iterator[str]:
    with serving(place / "index", embed_scene) as address:
        yield address


def ask(
    address: str, path: str, body: object = None, headers: dict[str, str] | None = None
) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=20)
    sent = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    given = {"content-type": "application/json"} if body is not None else {}
    connection.request("GET" if body is None else "POST", path, sent, {**given, **(headers or {})})
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, {k.lower(): v for k, v in answer.getheaders()}, content


def search(address: str, **body: object) -> list[dict[str, Any]]:
    status, _, content = ask(address, "/api/search", body)
    assert status == 200, content
    hits: list[dict[str, Any]] = json.loads(content)["hits"]
    return hits


def jpeg(image: Image.Image, **options: Any) -> str:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95, **options)
    return base64.b64encode(file.getvalue()).decode()


def test_words(address: str) -> None:
    hits = search(address, text="snow", top=6)
    assert all("snow" in (hit["text"] or hit["name"]).lower() for hit in hits)
    assert [hit["score"] for hit in hits] == sorted((hit["score"] for hit in hits), reverse=True)
    assert set(hits[0]) == {
        "id", "score", "kind", "name", "path", "line", "text", "width", "height"
    }  # fmt: skip


def test_a_photograph_alone_and_with_words(address: str) -> None:
    """Turned by its EXIF orientation, it finds what it was turned from."""
    scene, exif = draw_scene("beach", 3), Image.Exif()
    exif[0x0112] = 6
    turned = jpeg(scene.transpose(Image.Transpose.ROTATE_90), exif=exif)
    for image in (jpeg(scene), turned):
        assert search(address, image=image, top=1)[0]["name"] == "beach-3.jpg"
    vector = embed_scene({"image": scene, "text": "at night"})
    expected = embed_scene(scene) @ vector
    both = search(address, image=jpeg(scene), text=" at night ", top=40)
    (found,) = [hit["score"] for hit in both if hit["name"] == "beach-3.jpg"]
    assert found == pytest.approx(expected, abs=5e-3) and found < both[0]["score"]


def test_more_and_less(address: str, place: Path) -> None:
    """Added and taken away at half the weight; an empty one is none."""
    vector = embed_scene("desert") + embed_scene("snow") / 2 - embed_scene("beach") / 2
    vector /= np.linalg.norm(vector)
    hits = search(address, text="desert", more=["snow", " "], less=["beach"], top=40)
    for hit in hits:
        item = Path(hit["path"]) if hit["kind"] == "image" else hit["text"]
        assert hit["score"] == pytest.approx(embed_scene(item) @ vector, abs=1e-3)
    assert [hit["id"] for hit in hits] != [hit["id"] for hit in search(address, text="desert")]


def test_like_a_row_leaves_it_out(address: str) -> None:
    first = search(address, text="desert", top=1)[0]
    hits = search(address, like=first["id"], top=5)
    assert len(hits) == 5 and first["id"] not in [hit["id"] for hit in hits]
    assert {hit["name"].split("-")[0] for hit in hits} == {"desert"}


def test_near_duplicates(address: str) -> None:
    plain = {hit["name"] for hit in search(address, text="night", top=40)}
    hidden = {hit["name"] for hit in search(address, text="night", top=40, hide_duplicates=True)}
    assert {"night-0.jpg", "night-0-edited.jpg"} <= plain
    assert len({"night-0.jpg", "night-0-edited.jpg"} & hidden) < 2


def test_files(address: str, place: Path) -> None:
    hits = search(address, text="forest", top=40)
    image = next(hit for hit in hits if hit["kind"] == "image")
    status, headers, small = ask(address, f"/thumbnail/{image['id']}")
    assert status == 200 and headers["content-type"] == "image/jpeg"
    assert Image.open(io.BytesIO(small)).size == (image["width"], image["height"]) == (400, 300)
    status, headers, content = ask(address, f"/original/{image['id']}")
    assert status == 200 and headers["content-type"] == "image/jpeg"
    assert content == (place / "photos" / image["name"]).read_bytes()
    text = next(hit for hit in hits if hit["kind"] == "text")
    assert text["text"] in TEXTS and text["line"] == 1 + TEXTS.index(text["text"])
    status, headers, content = ask(address, f"/original/{text['id']}")
    assert headers["content-type"].startswith("text/plain")
    assert ask(address, f"/thumbnail/{text['id']}")[0] == 404
    for path in (
        "/original/999999",
        "/thumbnail/99999999999999999999999",
        "/original/..%2Fx",
        "/x",
    ):
        status, _, content = ask(address, path)
        assert status == 404 and json.loads(content)["error"]["message"]


def test_what_is_indexed(address: str, place: Path) -> None:
    _, _, content = ask(address, "/api/index")
    assert json.loads(content) == {
        "images": 36, "texts": 4, "files": 37, "failed": 0,
        "roots": [str(place / "photos")], "model": "drawn",
    }  # fmt: skip


def test_the_page_asks_nobody_else(address: str) -> None:
    for path, kind in (("/", "text/html"), ("/style.css", "text/css"), ("/search.js", "text/java")):
        status, headers, content = ask(address, path)
        assert status == 200 and headers["content-type"].startswith(kind)
        assert headers["content-security-policy"].startswith("default-src 'self';")
        assert headers["x-content-type-options"] == "nosniff"
        assert b"http://" not in content.replace(b"http://www.w3.org", b"")
        assert b"https://" not in content


@pytest.mark.parametrize(
    ("body", "message", "field"),
    [
        ({}, "nothing to search for", None),
        ({"text": "  "}, "nothing to search for", None),
        ({"text": 3}, "text: expected a string", "text"),
        ({"text": "\ud800"}, "text: expected a string", "text"),
        ({"text": "x", "topp": 3}, "unknown field 'topp'", "topp"),
        ({"text": "x", "top": 501}, "top: expected 1 to 500", "top"),
        ({"text": "x", "top": True}, "top: expected 1 to 500", "top"),
        ({"text": "x", "more": "snow"}, "more: expected at most 8 strings", "more"),
        ({"text": "x", "less": ["a"] * 9}, "less: expected at most 8 strings", "less"),
        ({"text": "x", "hide_duplicates": 1}, "hide_duplicates: expected true", "hide_duplicates"),
        ({"like": -1}, "like: expected the number of a row", "like"),
        ({"like": 10**9}, "no more in the index", None),
        ({"like": 10**30}, "like: expected the number", "like"),
        ({"image": "%%%"}, "image: not base64", "image"),
        ({"image": "aGVsbG8="}, "not an image in a format that is read", None),
        ({"text": "snow", "less": ["snow", "snow"]}, "the terms take each other away", None),
        (b"{", "the body is not JSON", None),
        (b"[" * 100_000, "the body is not JSON", None),
        ([], "the body is not a JSON object", None),
    ],
)
def test_bad_requests(address: str, body: object, message: str, field: str | None) -> None:
    status, _, content = ask(address, "/api/search", body)
    error = json.loads(content)["error"]
    assert status == 400 and message in error["message"] and error["field"] == field


def test_refusals_before_the_body_is_read(address: str) -> None:
    status, _, _ = ask(address, "/api/search", b"{}", {"content-length": str(MAX_BODY + 1)})
    assert status == 413
    status, _, _ = ask(address, "/api/search", b'{"text":"x"}', {"content-type": "text/plain"})
    assert status == 415
    assert ask(address, "/", {"text": "x"})[0] == 405
    for host, expected in (("evil.example", 400), ("localhost:1", 200), ("127.0.0.1", 200)):
        assert ask(address, "/api/index", headers={"host": host})[0] == expected


def test_too_many_at_once(place: Path) -> None:
    """No more than 32 wait; the others are told to come again, and all others get their answer."""
    gate, codes = threading.Event(), list[int]()

    def slow(item: Input) -> np.ndarray:
        gate.wait(20)
        return embed_scene(item)

    with serving(place / "index", slow) as address:

        def one() -> None:
            codes.append(ask(address, "/api/search", {"text": "snow"})[0])
            if codes.count(429) == 8:
                gate.set()

        threads = [threading.Thread(target=one) for _ in range(40)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert sorted(codes) == [200] * 32 + [429] * 8


def test_an_index_made_anew(tmp_path: Path) -> None:
    """With another model: no scores of two models' vectors, but what to do."""
    index_scenes(tmp_path)
    with serving(tmp_path / "index", embed_scene) as address:
        assert ask(address, "/api/search", {"text": "snow"})[0] == 200
        writer = Writer(tmp_path / "index")
        with writer.commit():
            writer.begin_anew(identity={"model": "another"}, model={})
        update(writer, [], embed_scenes)
        status, _, content = ask(address, "/api/search", {"text": "snow"})
        assert (
            status == 503 and "start this program again" in json.loads(content)["error"]["message"]
        )


def test_ports_and_names() -> None:
    taken = listen("127.0.0.1", 0)
    taken.listen()
    port = taken.getsockname()[1]
    with pytest.raises(OSError, match=f"--port {port}: Address already in use; choose another"):
        listen("127.0.0.1", port)
    taken.close()
    with pytest.raises(OSError, match=r"--host 203\.0\.113\.1 --port 0: "):
        listen("203.0.113.1", 0)
    assert "evil.example" not in names_of("0.0.0.0", ())
    assert socket.gethostname() in names_of("0.0.0.0", ())
    assert "photos.local" in names_of("127.0.0.1", ("photos.local",))


def test_the_command(llava: "Callable[[str], Case]", tmp_path: Path) -> None:
    """It loads the index's model, says where it is, answers by it, and ends at SIGTERM."""
    model = llava("llama-gqa").folder
    (tmp_path / "lines.txt").write_text("A dog sleeps.\nSnow falls.\n")
    words = ["index", str(tmp_path / "lines.txt"), "--index", str(tmp_path / "index")]
    with pytest.raises(SystemExit) as end:
        main([*words, "--model", str(model), "--dtype", "float32"])
    assert end.value.code == 0
    serve = ["serve", "--index", str(tmp_path / "index"), "--port", "0"]
    child = subprocess.Popen(
        [sys.executable, "-m", "e5v_jax.search", *serve],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert child.stdout is not None
        address, told = child.stdout.readline().split("/  ")
        assert told.startswith("0 photographs and 2 texts of ")
        hits = search(address, text="Snow falls.")
        e5v = E5V.from_pretrained(model, dtype="float32")
        query = e5v.encode_query("Snow falls.")
        expected = e5v.encode_document(["A dog sleeps.", "Snow falls."]) @ query
        found = {hit["line"]: hit["score"] for hit in hits}
        np.testing.assert_allclose([found[1], found[2]], expected, atol=1e-3)
        child.send_signal(signal.SIGTERM)
        assert child.wait(20) == 0
        assert child.stderr is not None and child.stderr.read() == ""
    finally:
        child.kill()
        child.communicate()
