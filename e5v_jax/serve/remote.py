"""Fetch an image for a stranger: from allowed hosts at public addresses only, within limits.

A name is resolved once. Its addresses are checked and the connection is made to one of them, so
that a second answer of the name server (DNS rebinding) is never asked for; TLS still checks the
certificate against the name. A URL is taken apart once, strictly, and what is connected to is made
of these parts, so that no second parser can read it otherwise. Nothing of the environment is
obeyed: no proxy, no .netrc, no cookies.
"""

import asyncio
import os
import re
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from urllib.parse import urljoin, urlsplit

import certifi
import httpcore

from e5v_jax.serve.addresses import is_public
from e5v_jax.serve.policy import MediaError, MediaPolicy

PORTS = {"http": 80, "https": 443}
_REDIRECTS = (301, 302, 303, 307, 308)
_TRIES = 4  # addresses of one name that are tried
_HEADERS = [
    (b"User-Agent", b"e5v-serve"),
    (b"Accept", b"image/png, image/jpeg, image/webp, image/gif"),
    (b"Accept-Encoding", b"identity"),  # what is compressed could grow without limit
]


@cache
def _tls() -> ssl.SSLContext:
    """certifi's authorities, or those of SSL_CERT_FILE; read once, it takes 20 ms."""
    own = os.environ.get("SSL_CERT_FILE")
    return ssl.create_default_context(cafile=own or certifi.where())


async def resolve(host: str, port: int) -> Sequence[str]:
    """The addresses of a name, as this machine finds them. Raises OSError: none."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(info[4][0]) for info in found))


@dataclass(frozen=True)
class Network:
    """How names are resolved and connections made, which a test plays."""

    resolve: Callable[[str, int], Awaitable[Sequence[str]]] = resolve
    backend: httpcore.AsyncNetworkBackend = field(default_factory=httpcore.AnyIOBackend)
    tls: Callable[[], ssl.SSLContext] = _tls


INTERNET = Network()


@dataclass(frozen=True)
class Place:
    """A URL in the parts that a request is made of; made by :func:`read_url` alone."""

    scheme: str
    host: str
    """Lower case; an IPv6 address is without its brackets."""
    port: int
    target: str
    """Path and query."""

    @property
    def authority(self) -> str:
        """Host and, where it is not the scheme's own, port: as the Host header has them."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == PORTS[self.scheme] else f"{host}:{self.port}"


def read_url(url: str, policy: MediaPolicy) -> Place:
    """Take a URL apart and check its host against the allowed ones.

    Raises MediaError: what browsers, servers and libraries are known to read differently (other
    characters than printable ASCII, a backslash, a user name), a scheme that is not http or https,
    a host that is not allowed.
    """
    if not re.fullmatch(r"[!-\[\]-~]{1,8192}", url):
        raise MediaError(
            "image URL: expected up to 8192 printable ASCII characters without space or backslash; "
            "percent-encode the others"
        )
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").removesuffix("."), parts.port
    except ValueError:
        raise MediaError("image URL: its host or port cannot be read") from None
    if parts.scheme not in PORTS:
        raise MediaError("image URL: expected http or https")
    if "@" in parts.netloc:
        raise MediaError("image URL: a user name or password is not allowed")
    if not re.fullmatch(r"[a-z0-9._-]+|[0-9a-f:.]+", host):
        raise MediaError("image URL: its host is not a name or an address")
    if port is None:
        port = PORTS[parts.scheme]
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    place = Place(parts.scheme, host, port, target)
    if not policy.allows(place.host, None if port == PORTS[parts.scheme] else port):
        raise MediaError(
            f"image URL: the host {place.authority[:253]} is not one that images are fetched from; "
            "send the image as a data: URL"
        )
    return place


async def fetch(url: str, policy: MediaPolicy, network: Network = INTERNET) -> bytes:
    """Fetch the bytes that an http or https URL gives, following redirects.

    Raises:
        MediaError: an address that is not allowed (see :func:`read_url`) or not public, an answer
            other than 200, more than ``max_bytes`` (413), ``timeout_s`` or ``max_redirects``.
    """
    try:
        async with asyncio.timeout(policy.timeout_s):
            for _ in range(policy.max_redirects + 1):
                place = read_url(url, policy)
                answer = await _get(place, await _addresses(place, network), policy, network)
                if isinstance(answer, bytes):
                    return answer
                url = urljoin(url, answer)
                if place.scheme == "https" and not url.lower().startswith("https:"):
                    raise MediaError("image URL: redirected from https to another scheme")
    except TimeoutError:
        raise MediaError(
            f"image URL: fetching it took more than the {policy.timeout_s:g} seconds allowed"
        ) from None
    raise MediaError(f"image URL: more than the {policy.max_redirects} redirects allowed")


async def _addresses(place: Place, network: Network) -> Sequence[str]:
    try:
        found = await network.resolve(place.host, place.port)
        # one that is not public among others is an attack as well, or a mistake
        if found and all(map(is_public, found)):
            return found[:_TRIES]
    except (OSError, ValueError):  # UnicodeError, of a label too long, is a ValueError
        found = []
    # not which address: that would tell a stranger what is inside
    reason = "is not at a public address" if found else "was not found"
    raise MediaError(f"image URL: the host {place.authority} {reason}")


class _Pinned(httpcore.AsyncNetworkBackend):
    """Connects to the addresses that were checked, whatever name it is asked for."""

    def __init__(self, addresses: Sequence[str], backend: httpcore.AsyncNetworkBackend) -> None:
        self.addresses, self.backend = addresses, backend

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        share = timeout and timeout / len(self.addresses)
        for address in self.addresses[:-1]:
            try:
                return await self.backend.connect_tcp(address, port, timeout=share)
            except (httpcore.ConnectError, httpcore.ConnectTimeout):
                continue
        return await self.backend.connect_tcp(self.addresses[-1], port, timeout=share)


async def _get(
    place: Place, addresses: Sequence[str], policy: MediaPolicy, network: Network
) -> bytes | str:
    """The body of an answer, or where it redirects to."""
    target = httpcore.URL(
        scheme=place.scheme.encode(),
        host=place.host.encode(),
        port=place.port,
        target=place.target.encode(),
    )
    headers = [(b"Host", place.authority.encode()), *_HEADERS]
    kinds = ("connect", "read", "write", "pool")
    limits = {"timeout": dict.fromkeys(kinds, policy.timeout_s)}
    try:
        async with (
            httpcore.AsyncConnectionPool(
                ssl_context=network.tls() if place.scheme == "https" else None,
                network_backend=_Pinned(addresses, network.backend),
            ) as pool,
            pool.stream("GET", target, headers=headers, extensions=limits) as response,
        ):
            found = {name.lower(): value for name, value in response.headers}
            if response.status in _REDIRECTS and b"location" in found:
                return found[b"location"].decode("latin-1")
            if response.status != 200:
                raise MediaError(f"image URL: its host answered {response.status}, expected 200")
            if found.get(b"content-encoding", b"identity").lower() != b"identity":
                raise MediaError("image URL: its host answered with a compressed body")
            return await _read(response, found.get(b"content-length"), policy)
    except httpcore.TimeoutException:
        raise TimeoutError from None
    except (httpcore.NetworkError, httpcore.ProtocolError, OSError):
        raise MediaError(
            "image URL: it cannot be fetched: no connection, a certificate that does not fit, or "
            "an answer that broke off"
        ) from None


async def _read(response: httpcore.Response, length: bytes | None, policy: MediaPolicy) -> bytes:
    too_long = MediaError(f"image URL: more than the {policy.max_bytes} bytes allowed", 413)
    if length is not None and int(length) > policy.max_bytes:  # h11 lets digits through alone
        raise too_long
    body = bytearray()
    async for part in response.aiter_stream():
        body += part
        if len(body) > policy.max_bytes:
            raise too_long
    return bytes(body)
