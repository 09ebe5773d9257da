"""Images from strangers, as they are sent: what is decoded, and what is refused."""

import asyncio
import base64
import hashlib
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from media_server import POLICY
from odd_images import bombs, encode, every_file, lying, noise
from PIL import Image

from e5v_jax.data import images
from e5v_jax.serve.media import (
    FORMATS,
    MediaError,
    MediaPolicy,
    decode_base64,
    decode_image,
    load_image,
)

PICTURE = noise(40, 30)
PNG = encode(PICTURE, "PNG")
FILES = {f"{fmt}, {name}": (fmt, data) for name, fmt, data in every_file(PICTURE)}
SENT = base64.b64encode(PNG).decode()
AT = "https://images.test/a.png"


def load(reference: str, policy: MediaPolicy = POLICY) -> Image.Image:
    image, digest = asyncio.run(load_image(reference, policy))
    assert digest == hashlib.sha256(PNG).hexdigest()
    return image


def refused(reference: str, policy: MediaPolicy = POLICY) -> MediaError:
    with pytest.raises(MediaError) as caught:
        asyncio.run(load_image(reference, policy))
    assert str(caught.value).isprintable() and len(str(caught.value)) < 600
    return caught.value


@pytest.mark.parametrize("name", FILES)
def test_each_format_is_what_its_bytes_would_be(name: str) -> None:
    """Or is refused: the server reads four formats."""
    fmt, data = FILES[name]
    if fmt not in FORMATS:
        with pytest.raises(MediaError, match="not an image in a format that is read: PNG, JPEG"):
            decode_image(data, POLICY)
        return
    image, digest = decode_image(data, POLICY)
    assert digest == hashlib.sha256(data).hexdigest()
    for transparency in ("drop", "white"):
        for resize in (None, (13, 17)):
            expected = images.load_image(data, resize, transparency=transparency)
            found = images.load_image(image, resize, transparency=transparency)
            np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))


@pytest.mark.parametrize(
    "reference",
    [
        f"data:image/png;base64,{SENT}",
        f"DATA:image/PNG;name=a.png;BASE64,{SENT}",
        f"data:;base64,{SENT}",
        f"data:application/octet-stream;base64,{SENT}",
        f"data:image/png;base64,{SENT.replace('+', '%2B').replace('=', '%3D')}",
        f"data:image/jpeg;base64,{SENT}",  # the bytes say what it is
        SENT,
        SENT.rstrip("="),
        base64.encodebytes(PNG).decode(),
    ],
)
def test_what_is_read(reference: str) -> None:
    np.testing.assert_array_equal(np.asarray(load(reference)), np.asarray(PICTURE))


@pytest.mark.parametrize(
    ("reference", "reason"),
    [
        ("", "empty"),
        ("data:image/png;base64,", "empty"),
        ("data:image/png,abc", "must be in base64"),
        ("data:text/html;base64,PGI+", "must be of an image"),
        ("data:image/png;base64", "expected a data:"),
        ("data:image/png;base64,!!!", "not base64"),
        ("data:image/png;base64,AAAAA", "not base64"),
        ("data:image/png;base64,AAAA", "not an image in a format"),
        (f"data:image/png;base64,{SENT[: len(SENT) // 2]}", "cannot be read as an image"),
        ("data:image/png;base64,é", "not base64"),
        ("\ud800", "not base64"),
        ("a photo of a dog", "not an image in a format"),
        ("a photograph, of a dog", "not base64"),
        ("file:///etc/passwd", "expected a data:, http: or https: URL"),
        (" file:///etc/passwd", "expected a data:, http: or https: URL"),
        ("ftp://images.test/a.png", "expected a data:, http: or https: URL"),
        ("gopher://images.test:70/_", "expected a data:, http: or https: URL"),
        ("javascript:alert(1)", "expected a data:, http: or https: URL"),
        ("C:\\Windows\\win.ini", "expected a data:, http: or https: URL"),
        ("../../etc/passwd", "not base64"),
        ("\\\\server\\share\\a.png", "not base64"),
        ("//images.test/a.png", "not base64"),
    ],
)
def test_what_is_not_read(reference: str, reason: str) -> None:
    error = refused(reference)
    assert reason in error.reason and error.status == 400


def test_no_file_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pngs").write_bytes(PNG)
    monkeypatch.chdir(tmp_path)
    for name in ("pngs", str(tmp_path / "pngs"), f"file://{tmp_path}/pngs"):
        assert refused(name).status == 400


def test_cut_short_anywhere() -> None:
    """A file that broke off is refused, or holds its first frame whole."""
    animated = [PICTURE.rotate(90 * turn, expand=True).resize(PICTURE.size) for turn in range(3)]
    for fmt in FORMATS:
        more = {} if fmt == "JPEG" else {"save_all": True, "append_images": animated}
        data = encode(PICTURE, fmt, **more)
        whole = np.asarray(images.load_image(data))
        for end in range(0, len(data), max(len(data) // 40, 1)):
            try:
                image, _ = decode_image(data[:end], POLICY)
            except MediaError as error:
                assert error.status == 400 and error.reason.isprintable()
            else:
                assert end > len(data) / 8
                np.testing.assert_array_equal(np.asarray(images.load_image(image)), whole)


@pytest.mark.parametrize("fmt", FORMATS)
def test_one_pixel(fmt: str) -> None:
    """vLLM could not tell which axis of a 1x1 image has the channels, and ended."""
    image, _ = decode_image(encode(Image.new("RGB", (1, 1), "red"), fmt), POLICY)
    assert image.size == (1, 1) and images.load_image(image).size == (1, 1)
    image, _ = decode_image(encode(Image.new("RGB", (3, 3), "red"), fmt), POLICY)
    assert images.load_image(image).size == (3, 3)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("fmt", FORMATS)
def test_pixels_by_the_header(fmt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(*_: object) -> None:
        raise AssertionError("decoded")

    policy = replace(POLICY, max_pixels=40 * 30)
    assert decode_image(encode(PICTURE, fmt), policy)[0].size == PICTURE.size
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decode)
    for data in (encode(noise(40, 31), fmt), lying(fmt, 9000, 9000), lying(fmt, 12000, 12000)):
        with pytest.raises(MediaError, match="more than the 1200 allowed") as caught:
            decode_image(data, policy)
        assert caught.value.status == 413


@pytest.mark.filterwarnings("ignore")  # Pillow's own, about the damage
@pytest.mark.parametrize(
    ("name", "data"), [(n, d) for n, d in bombs()], ids=[n for n, _ in bombs()]
)
def test_bombs(name: str, data: bytes) -> None:
    start = time.perf_counter()
    with pytest.raises(MediaError):
        decode_image(data, replace(POLICY, max_bytes=2**24))
    assert time.perf_counter() - start < 2


def test_too_many_bytes_are_not_even_copied() -> None:
    long = f"data:image/png;base64,{'A' * 200_000}"
    start = time.perf_counter()
    assert refused(long).status == 413
    assert time.perf_counter() - start < 0.1
    just_over = base64.b64encode(bytes(POLICY.max_bytes + 1)).decode()
    assert refused(just_over).status == 413
    assert decode_base64(SENT, replace(POLICY, max_bytes=len(PNG))) == PNG
    with pytest.raises(MediaError, match="allowed") as caught:
        decode_image(PNG, replace(POLICY, max_bytes=len(PNG) - 1))
    assert caught.value.status == 413


def test_the_policy_takes_names_and_ports_only() -> None:
    policy = MediaPolicy(frozenset({"Images.Example.COM", "a.b:8443", "[2606:2800::1]"}))
    assert policy.allows("images.example.com", None) and policy.allows("a.b", 8443)
    assert policy.allows("2606:2800::1", None) and not policy.allows("a.b", None)
    for host in ("https://a.b", "a.b/path", "a@b", "*.a.b", "", "a b", "a.b:x"):
        with pytest.raises(ValueError, match="expected a name, or a name and a port"):
            MediaPolicy(frozenset({host}))
