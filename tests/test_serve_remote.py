"""Images from strangers, as they are fetched: from where, how much, and what is never reached."""

import asyncio
import hashlib
import ssl
import time
from dataclasses import replace

import numpy as np
import pytest
import trustme
from media_server import POLICY, PUBLIC, Internet, drip, flood, ok, redirect, slow_head
from odd_images import encode, noise

from e5v_jax.serve.addresses import is_public
from e5v_jax.serve.media import MediaError, MediaPolicy, load_image
from e5v_jax.serve.remote import INTERNET, read_url, resolve

PICTURE = noise(40, 30)
PNG = encode(PICTURE, "PNG")
AT = "https://images.test/a.png"


def test_nothing_is_fetched_by_default() -> None:
    with pytest.raises(MediaError, match=r"host images\.test is not one that images are fetched"):
        asyncio.run(load_image(AT, MediaPolicy()))


def test_an_image_is_fetched_from_the_address_that_was_checked() -> None:
    internet = Internet({"images.test/a.png?size=9": ok(PNG)})
    url = "http://IMAGES.test/a.png?size=9#part"
    image, digest = asyncio.run(internet.use(lambda network: load_image(url, POLICY, network)))
    np.testing.assert_array_equal(np.asarray(image), np.asarray(PICTURE))
    assert digest == hashlib.sha256(PNG).hexdigest()
    assert internet.connected == [(PUBLIC, 80)] and internet.asked == ["images.test"]
    (request,) = internet.requests
    assert "Accept-Encoding: identity" in request
    assert not {"cookie", "authorization", "referer"} & set(request.lower().split())


def test_nothing_of_the_environment_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "https_proxy"):
        monkeypatch.setenv(name, "http://10.0.0.1:3128")
    internet = Internet({"images.test/a.png": ok(PNG)})
    assert internet.fetch("http://images.test/a.png") == PNG
    assert internet.connected == [(PUBLIC, 80)]


@pytest.mark.parametrize(
    "url",
    [
        "http://evil.test/a.png",
        "http://images.test.evil.test/a.png",
        "http://images.test:8080/a.png",  # a port that was not allowed
        "http://images.test@evil.test/a.png",
        "http://evil.test@images.test/a.png",
        "http://user:password@images.test/a.png",
        "http://:@images.test/a.png",
        # urllib3 and aiohttp, as vLLM had them, take these for different hosts
        "http://images.test\\@evil.test/a.png",
        "http://evil.test\\@images.test/a.png",
        "http:\\\\images.test\\a.png",
        "http://images.test\t/a.png",
        "http://images.test\r\nHost: evil.test\r\n\r\n/a.png",
        "http://images.test/a b.png",
        "http://images.test/\x00",
        "http://images.test:99999/a.png",
        "http://images.test:port/a.png",
        "http://[images.test/a.png",
        "http://[::1]evil/a.png",
        "http://images.test%2eevil.test/a.png",
        "http://images\u3002test/a.png",  # an ideographic full stop, which IDNA takes for a dot
        "http://\u0131mages.test/a.png",
        "http:///a.png",
        "http:images.test/a.png",
        "http://",
        "https:",
        "http://images.test/" + "a" * 9000,
    ],
)
def test_urls_that_are_refused_before_any_name_is_resolved(url: str) -> None:
    internet = Internet({})
    with pytest.raises(MediaError) as caught:
        internet.fetch(url)
    assert caught.value.status == 400 and caught.value.reason.isprintable()
    assert not internet.asked and not internet.connected


NOT_PUBLIC = [
    "127.0.0.1", "127.255.255.254", "0.0.0.0", "0.1.2.3", "10.0.0.1", "172.16.0.1",
    "172.31.255.255", "192.168.1.1", "169.254.169.254", "100.64.0.1", "100.100.100.200",
    "168.63.129.16", "192.0.0.1", "192.0.2.1", "198.18.0.1", "198.51.100.1", "203.0.113.1",
    "224.0.0.1", "239.255.255.255", "240.0.0.1", "255.255.255.255", "192.88.99.1",
    "::", "::1", "::ffff:127.0.0.1", "::ffff:7f00:1", "::ffff:10.0.0.1", "::ffff:169.254.169.254",
    "::127.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a00:1", "64:ff9b:1::1", "2002:7f00:1::",
    "2002:0a00:0001::1", "2001:0:5ef5:79fb::1", "fe80::1", "fe80::1%eth0", "fec0::1", "fc00::1",
    "fd00:ec2::254", "ff02::1", "2001:db8::1", "100::1",
]  # fmt: skip


@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_addresses_that_are_not_public(address: str) -> None:
    """Whatever name they are found under, alone or beside a public one."""
    assert not is_public(address)
    for answer in ([address], [PUBLIC, address], [address, PUBLIC]):
        internet = Internet({}, names={"images.test": [answer]})
        with pytest.raises(MediaError, match=r"images\.test is not at a public address") as caught:
            internet.fetch("http://images.test/a.png")
        assert address not in caught.value.reason
        assert not internet.connected


def test_addresses_that_are_public() -> None:
    for address in (PUBLIC, "1.1.1.1", "2606:2800:21f:cb07::1", "::ffff:1.1.1.1"):
        assert is_public(address)
    assert is_public("64:ff9b::101:101")  # how a network without IPv4 reaches 1.1.1.1


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "2130706433", "0177.0.0.1", "0x7f.0.0.1", "0x7f000001", "127.1", "0", "[::1]",
     "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[0:0:0:0:0:0:0:1]", "localhost", "localhost."],
)  # fmt: skip
def test_numbers_and_names_of_this_machine(host: str) -> None:
    """Even if somebody allowed them: resolved by this machine, and no connection is made."""

    class NoConnection(Internet):
        resolve = staticmethod(resolve)  # the real one

    for policy in (POLICY, replace(POLICY, allowed_hosts=frozenset({host.removesuffix(".")}))):
        internet = NoConnection({})
        with pytest.raises(MediaError) as caught:
            internet.fetch(f"http://{host}/a.png", policy)
        assert not internet.connected
        if policy is not POLICY:
            assert "public address" in caught.value.reason or "not found" in caught.value.reason


def test_a_name_is_resolved_once() -> None:
    """DNS rebinding: the second answer, which is this machine, is never asked for."""
    answers: list[list[str]] = [[PUBLIC], ["127.0.0.1"]]
    internet = Internet({"images.test/a.png": ok(PNG)}, names={"images.test": list(answers)})
    assert internet.fetch("http://images.test/a.png") == PNG
    assert internet.connected == [(PUBLIC, 80)] and internet.asked == ["images.test"]
    again = redirect("http://images.test/b.png")
    pages = {"images.test/a.png": again, "images.test/b.png": ok(PNG)}
    internet = Internet(pages, names={"images.test": list(answers)})
    with pytest.raises(MediaError, match="not at a public address"):
        internet.fetch("http://images.test/a.png")
    assert internet.connected == [(PUBLIC, 80)]


def test_the_next_address_is_tried() -> None:
    names = {"images.test": [["93.184.215.1", "93.184.216.1", PUBLIC, "1.1.1.3", "1.1.1.4"]]}
    internet = Internet({"images.test/a.png": ok(PNG)}, names=names)  # nobody is at .1
    assert internet.fetch("http://images.test/a.png") == PNG
    assert [address for address, _ in internet.connected][-1] == PUBLIC
    internet = Internet({}, names={"images.test": [["93.184.215.1", "93.184.216.1"]]})
    with pytest.raises(MediaError, match="cannot be fetched: no connection"):
        internet.fetch("http://images.test/a.png")


def test_names_that_are_not_found() -> None:
    for name in ("a" * 70 + ".test", "no-such-name.invalid", "-..-"):
        policy = replace(POLICY, allowed_hosts=frozenset({name}))
        with pytest.raises(MediaError, match="was not found"):
            Internet({}, names={name: [[]]}).fetch(f"http://{name}/a.png", policy)
    long = "a" * 70 + ".test"  # this machine's own resolver raises UnicodeError
    with pytest.raises(MediaError, match="was not found"):
        policy = replace(POLICY, allowed_hosts=frozenset({long}))
        asyncio.run(load_image(f"http://{long}/a.png", policy, INTERNET))


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_followed(status: int) -> None:
    pages = {
        "images.test/a.png": redirect("/deep/b.png", status),
        "images.test/deep/b.png": redirect("//other.test/c.png", status),
        "other.test/c.png": ok(PNG),
    }
    internet = Internet(pages)
    assert internet.fetch("http://images.test/a.png") == PNG
    assert internet.asked == ["images.test", "images.test", "other.test"]


@pytest.mark.parametrize(
    "location",
    [
        "http://127.0.0.1/latest/meta-data/",
        "http://127.0.0.1:6379/",
        "http://169.254.169.254/latest/meta-data/",
        "http://[::1]/",
        "http://[::ffff:127.0.0.1]/",
        "http://2130706433/",
        "http://0x7f.1/",
        "http://localhost/",
        "http://evil.test/",
        "//evil.test/",
        "\\\\evil.test\\",
        "http://images.test\\@evil.test/",
        "http://images.test@evil.test/",
        "http://images.test:22/",
        "file:///etc/passwd",
        "gopher://images.test/",
        "data:image/png;base64,AAAA",
        "http://images.test/\xe9",
    ],
)
def test_redirects_to_elsewhere(location: str) -> None:
    internet = Internet({"images.test/a.png": redirect(location)})
    with pytest.raises(MediaError) as caught:
        internet.fetch("http://images.test/a.png")
    assert caught.value.status == 400 and "image URL: " in caught.value.reason
    assert internet.connected == [(PUBLIC, 80)] and internet.asked == ["images.test"]


def test_redirects_without_end() -> None:
    internet = Internet({"images.test/a.png": redirect("/a.png")})
    with pytest.raises(MediaError, match="more than the 2 redirects allowed"):
        internet.fetch("http://images.test/a.png")
    assert len(internet.connected) == 3


def test_a_redirect_to_an_allowed_name_at_a_private_address() -> None:
    internet = Internet(
        {"images.test/a.png": redirect("http://other.test/")}, names={"other.test": [["10.0.0.9"]]}
    )
    with pytest.raises(MediaError, match=r"other\.test is not at a public address"):
        internet.fetch("http://images.test/a.png")
    assert internet.connected == [(PUBLIC, 80)]


@pytest.mark.parametrize("slow", [drip, slow_head])
def test_seconds(slow: object) -> None:
    """Of all of it: an answer that comes a byte at a time never waits long for any."""
    internet = Internet({"images.test/a.png": slow})
    start = time.perf_counter()
    with pytest.raises(MediaError, match=r"took more than the 0.3 seconds allowed") as caught:
        internet.fetch("http://images.test/a.png", replace(POLICY, timeout_s=0.3))
    assert time.perf_counter() - start < 1.5
    assert caught.value.status == 400


def test_seconds_of_a_name_server_and_of_redirects() -> None:
    class Slow(Internet):
        async def resolve(self, host: str, port: int) -> list[str]:
            await asyncio.sleep(0.2)
            return [PUBLIC]

    internet = Slow({"images.test/a.png": redirect("/a.png")})
    with pytest.raises(MediaError, match=r"more than the 0\.3 seconds allowed"):
        internet.fetch("http://images.test/a.png", replace(POLICY, timeout_s=0.3))
    assert len(internet.connected) == 1


def test_too_many_bytes() -> None:
    """By what the head says before anything is read; else as soon as they have come."""
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n"
    pages = {
        "images.test/told": head % 100_001,
        "images.test/told-much": head % 10**15,
        "images.test/untold": flood,
        "images.test/just": ok(bytes(100_000)),
    }
    internet = Internet(pages)
    for path in ("told", "told-much", "untold"):
        with pytest.raises(MediaError, match="more than the 100000 bytes allowed") as caught:
            internet.fetch(f"http://images.test/{path}")
        assert caught.value.status == 413
    assert internet.fetch("http://images.test/just") == bytes(100_000)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", "answered 404, expected 200"),
        (b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\n\r\n", "answered 302"),  # to nowhere
        (b"HTTP/1.1 206 Part\r\nContent-Length: 0\r\n\r\n", "answered 206"),
        (ok(b"x" * 99, "Content-Encoding: gzip"), "compressed body"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc", "broke off"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: -9\r\n\r\nabc", "broke off"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1, 2\r\n\r\nabc", "broke off"),
        (b"+PONG\r\n", "broke off"),
        (b"", "broke off"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 200_000 + b"\r\n\r\n", "broke off"),
    ],
)
def test_answers_that_are_none(answer: bytes, reason: str) -> None:
    with pytest.raises(MediaError, match=reason) as caught:
        Internet({"images.test/a.png": answer}).fetch("http://images.test/a.png")
    assert caught.value.status == 400


def test_an_answer_that_is_no_image() -> None:
    internet = Internet({"images.test/a.png": ok(b"root:x:0:0:")})
    with pytest.raises(MediaError) as caught:
        asyncio.run(
            internet.use(lambda network: load_image("http://images.test/a.png", POLICY, network))
        )
    assert "root" not in caught.value.reason


def with_tls(authority: trustme.CA, name: str, pages: dict[str, bytes], trusted: bool) -> Internet:
    """A server with a certificate for ``name``, and a client that trusts its authority or not."""
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(name).configure_cert(tls)
    context = ssl.create_default_context()
    if trusted:
        authority.configure_trust(context)
    return Internet(pages, tls=tls, trust=lambda: context)


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.mark.parametrize("port", ["", ":8443"])
def test_tls_checks_the_name(authority: trustme.CA, port: str) -> None:
    """The connection is to an address; the certificate must be the name's."""
    url, pages = f"https://images.test{port}/a.png", {f"images.test{port}/a.png": ok(PNG)}
    good = with_tls(authority, "images.test", pages, True)
    assert good.fetch(url) == PNG
    assert good.connected == [(PUBLIC, int(port[1:] or 443))]
    for name, trusted in (("other.test", True), (PUBLIC, True), ("images.test", False)):
        bad = with_tls(authority, name, pages, trusted)
        with pytest.raises(MediaError, match="certificate that does not fit"):
            bad.fetch(url)
        assert not bad.requests


def test_https_is_not_left(authority: trustme.CA) -> None:
    pages = {"images.test/a.png": redirect("http://images.test/b.png")}
    with pytest.raises(MediaError, match="redirected from https"):
        with_tls(authority, "images.test", pages, True).fetch(AT)


def test_the_internet_itself_trusts_public_authorities_only() -> None:
    context = INTERNET.tls()
    assert context.verify_mode == ssl.CERT_REQUIRED and context.check_hostname
    assert len(context.get_ca_certs()) > 50


def test_read_url_gives_the_parts_that_are_requested() -> None:
    place = read_url("https://images.test:8443?q=1", POLICY)
    assert (place.authority, place.target) == ("images.test:8443", "/?q=1")
    place = read_url("HTTPS://images.test.:443/a/../b?c#d", POLICY)
    assert (place.authority, place.target) == ("images.test", "/a/../b?c")
    six = replace(POLICY, allowed_hosts=frozenset({"[2606:2800:21f::1]"}))
    assert read_url("http://[2606:2800:21F::1]/", six).authority == "[2606:2800:21f::1]"
