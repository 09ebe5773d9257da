"""The search page and its API, for one index. It asks no other host and trusts no other page.

GET  /                 the page; /style.css, /search.js
POST /api/search       {"text", "image" (base64), "like" (a row), "more", "less", "top",
                       "hide_duplicates"} -> {"hits": [...], "seconds": {...}}
GET  /api/index        what is indexed
GET  /thumbnail/ROW    a photograph in small; /original/ROW: the file itself
"""

import base64
import binascii
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import anyio.to_thread
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from e5v_jax.data.images import FORMATS
from e5v_jax.search.query import (
    DUPLICATE,
    WEIGHT,
    Embed,
    Hit,
    Term,
    Unavailable,
    combine,
    embed_terms,
    find,
    make_item,
)
from e5v_jax.search.store import IndexFolderError, Row, Store

MAX_BODY = 32 * 2**20  # bytes of a request: a photograph of 24 MB in base64
MAX_TOP = 500
_MAX_TERMS = 8
_MAX_WAITING = 32  # searches at a time, most of which wait for the model
_PAGE = Path(__file__).parent / "page"
_FILES = {"/": "index.html", "/style.css": "style.css", "/search.js": "search.js"}
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
_HEADERS = {
    # data: and blob: show the photograph that was dropped, which never leaves this machine
    "content-security-policy": "default-src 'self'; img-src 'self' blob: data:; base-uri 'none'; "
    "form-action 'self'; frame-ancestors 'none'; object-src 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}
_MEDIA_TYPES = {
    suffix: f"image/{name.lower()}" for name, suffixes in FORMATS.items() for suffix in suffixes
}


class RequestError(ValueError):
    """A request that is refused; the message is one line, ``field`` the part that is wrong."""

    def __init__(self, status: int, message: str, field: str | None = None) -> None:
        """``status`` is HTTP's."""
        super().__init__(message)
        self.status, self.field = status, field


@dataclass(frozen=True)
class Search:
    """What the body of a search asks for."""

    text: str | None = None
    image: bytes | None = None
    like: int | None = None
    more: tuple[str, ...] = ()
    less: tuple[str, ...] = ()
    top: int = 60
    hide_duplicates: bool = False

    @classmethod
    def parse(cls, body: bytes) -> "Search":
        """Read a body. Raises RequestError: names the field and what was expected."""
        try:
            found = json.loads(body)
        except (ValueError, RecursionError):
            raise RequestError(400, "the body is not JSON") from None
        if not isinstance(found, dict):
            raise RequestError(400, "the body is not a JSON object")
        for name, value in found.items():
            if name not in _CHECKS:
                raise RequestError(400, f"unknown field {name!r}", name)
            kind, fits = _CHECKS[name]
            if not fits(value):
                raise RequestError(400, f"{name}: expected {kind}", name)
        if isinstance(found.get("image"), str):
            try:
                found["image"] = base64.b64decode(found["image"], validate=True)
            except binascii.Error:
                raise RequestError(400, "image: not base64", "image") from None
        for name in ("more", "less"):
            found[name] = tuple(text for text in found.get(name, ()) if text.strip())
        search = cls(**{k: v for k, v in found.items() if v is not None})
        if not ((search.text or "").strip() or search.image or search.like is not None):
            raise RequestError(400, "nothing to search for: give text, image or like")
        return search

    def terms(self) -> list[Term]:
        """The terms of the query. Raises ImageError: the photograph cannot be read."""
        terms = [] if self.like is None else [Term(row=self.like)]
        if self.image or (self.text or "").strip():
            terms.append(Term(make_item(self.text, self.image)))
        for texts, weight in ((self.more, WEIGHT), (self.less, -WEIGHT)):
            terms += [Term(text.strip(), weight=weight) for text in texts]
        return terms


def _is_text(value: object) -> bool:
    return isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value)


def _is_list(value: object) -> bool:
    return isinstance(value, list) and len(value) <= _MAX_TERMS and all(map(_is_text, value))


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**63


_CHECKS = {
    "text": ("a string", lambda x: x is None or _is_text(x)),
    "image": ("a string of base64", lambda x: x is None or _is_text(x)),
    "like": ("the number of a row", lambda x: x is None or _is_int(x)),
    "more": (f"at most {_MAX_TERMS} strings", _is_list),
    "less": (f"at most {_MAX_TERMS} strings", _is_list),
    "top": (f"1 to {MAX_TOP}", lambda x: _is_int(x) and x <= MAX_TOP),
    "hide_duplicates": ("true or false", lambda x: isinstance(x, bool)),
}


def make_app(store: Store, embed: Embed, hosts: Sequence[str]) -> Starlette:
    """The page of an index, for requests to one of ``hosts`` (names without ports).

    Requests by another name are refused: a page of a stranger that had its name point here could
    else read the photographs. ``embed`` is called in threads; it embeds as the index was embedded.
    """
    routes = [Route(path, partial(_send_page, name)) for path, name in _FILES.items()]
    pages = _Pages(store, embed)
    routes += [
        Route("/api/search", pages.search, methods=["POST"]),
        Route("/api/index", pages.describe),
        Route("/thumbnail/{row:int}", pages.thumbnail),
        Route("/original/{row:int}", pages.original),
    ]
    middleware = [
        Middleware(_Headers),
        Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False),
    ]
    handlers: Mapping[Any, Any] = {
        ValueError: _refuse,
        Unavailable: _refuse,
        HTTPException: _tell_status,
        ClientDisconnect: _tell_gone,
    }
    return Starlette(routes=routes, middleware=middleware, exception_handlers=handlers)


class _Headers:
    """Every answer says what the page may do, and that nobody keeps it unless told otherwise."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                names = {name.lower() for name, _ in message["headers"]}
                more = {"cache-control": "no-cache", **_HEADERS}
                message["headers"] = [
                    *message["headers"],
                    *((k.encode(), v.encode()) for k, v in more.items() if k.encode() not in names),
                ]
            await send(message)

        await self._app(scope, receive, send_with_headers)


async def _send_page(name: str, request: Request) -> Response:
    return FileResponse(_PAGE / name, media_type=_TYPES[Path(name).suffix])


async def _refuse(request: Request, error: Exception) -> Response:
    told = error if isinstance(error, RequestError) else RequestError(400, str(error))
    if isinstance(error, IndexFolderError | Unavailable):
        told = RequestError(503, str(error))
    headers = {"retry-after": "1"} if told.status == 429 else None
    content = {"error": {"message": str(told), "field": told.field}}
    return JSONResponse(content, told.status, headers)


async def _tell_status(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": {"message": error.detail, "field": None}}, error.status_code)


async def _tell_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


class _Pages:
    """The handlers."""

    def __init__(self, store: Store, embed: Embed) -> None:
        self._store, self._embed = store, embed
        self._identity = store.read_meta().get("identity")
        self._waiting = 0

    async def search(self, request: Request) -> Response:
        if request.headers.get("content-type", "").partition(";")[0] != "application/json":
            # a stranger's page could send any other without asking
            raise RequestError(415, "expected the content type application/json")
        if self._waiting >= _MAX_WAITING:
            raise RequestError(429, "too many searches at once; try again in a moment")
        self._waiting += 1
        try:
            body = await _read_body(request)
            return JSONResponse(await anyio.to_thread.run_sync(self._search, body))
        finally:
            self._waiting -= 1

    def _search(self, body: bytes) -> dict[str, Any]:
        start = time.perf_counter()
        search = Search.parse(body)
        embedding = 0.0

        def embed(item: Any) -> Any:
            nonlocal embedding
            begin = time.perf_counter()
            vector = self._embed(item)
            embedding += time.perf_counter() - begin
            return vector

        # Before the index is read: it takes longer, and another search may read meanwhile.
        terms = embed_terms(search.terms(), embed)
        with self._store.reading() as now:
            now.check_identity(self._identity)
            vector = combine(terms, now)
            duplicates = DUPLICATE if search.hide_duplicates else None
            hits = find(now, vector, search.top + 1, duplicates=duplicates)
        hits = [hit for hit in hits if hit.row.id != search.like][: search.top]
        return {
            "hits": [_describe(hit, now.meta["roots"]) for hit in hits],
            "rows": int(now.live.size),
            "seconds": {
                "embedding": round(embedding, 6),
                "search": round(time.perf_counter() - start - embedding, 6),
            },
        }

    async def describe(self, request: Request) -> Response:
        def read() -> dict[str, Any]:
            meta = self._store.read_meta()
            model = Path(meta.get("model", {}).get("model", "")).name
            return {**self._store.count(), "roots": meta["roots"], "model": model}

        return JSONResponse(await anyio.to_thread.run_sync(read))

    async def thumbnail(self, request: Request) -> Response:
        def read() -> bytes | None:
            with self._store.reading() as now:
                return now.thumbnail(_row_number(request))

        jpeg = await anyio.to_thread.run_sync(read)
        if jpeg is None:
            raise RequestError(404, "no such photograph in the index")
        # a row's content may change, its address not
        return Response(jpeg, media_type="image/jpeg", headers={"cache-control": "max-age=60"})

    async def original(self, request: Request) -> Response:
        def read() -> Row | None:
            with self._store.reading() as now:
                return now.row(_row_number(request))

        row = await anyio.to_thread.run_sync(read)
        if row is None:
            raise RequestError(404, "no such file in the index")
        if not os.path.isfile(row.path):
            raise RequestError(404, f"{row.path}: not there any more; index again")
        kind = _MEDIA_TYPES.get(os.path.splitext(row.path)[1].lower(), "text/plain; charset=utf-8")
        return FileResponse(row.path, media_type=kind, content_disposition_type="inline")


def _row_number(request: Request) -> int:
    number: int = request.path_params["row"]
    return min(number, 2**63 - 1)  # what SQLite can look for


async def _read_body(request: Request) -> bytes:
    """Read a body of bounded size. Raises RequestError: it is larger."""
    too_large = RequestError(413, f"more than {MAX_BODY // 2**20} MB: make the photograph smaller")
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > MAX_BODY:
        raise too_large
    parts, size = [], 0
    async for part in request.stream():
        parts.append(part)
        size += len(part)
        if size > MAX_BODY:
            raise too_large
    return b"".join(parts)


def _describe(hit: Hit, roots: Sequence[str]) -> dict[str, Any]:
    row = hit.row
    inside = [root for root in roots if row.path.startswith(f"{root}{os.sep}")]
    name = os.path.relpath(row.path, inside[0]) if inside else os.path.basename(row.path)
    return {
        "id": row.id,
        "score": round(hit.score, 6),
        "kind": row.kind,
        "name": name,
        "path": row.path,
        "line": row.line,
        "text": row.text,
        "width": row.width,
        "height": row.height,
    }
