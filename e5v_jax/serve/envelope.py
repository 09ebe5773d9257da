"""What every request goes through: its id, the API key, a line of the log, and errors as JSON."""

import logging
import time
from types import ModuleType

import msgspec
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from e5v_jax.serve.auth import Keys
from e5v_jax.serve.dialects import cohere, openai
from e5v_jax.serve.dialects.task import Refusal
from e5v_jax.serve.logs import choose_id, request_id
from e5v_jax.serve.metrics import Metrics

OPEN = ("/live", "/ready")  # without a key
_FIELDS = "e5v.fields"  # of a scope: what the line of the log says besides
_logger = logging.getLogger("e5v_jax")


def note(request: Request, **fields: object) -> None:
    """Add to the line that the log has of a request."""
    request.scope.setdefault(_FIELDS, {}).update(fields)


def dialect_of(path: str) -> ModuleType:
    """Whose errors a path answers with, as long as no body tells."""
    return cohere if path.startswith("/v2/") or path.endswith("/rerank") else openai


def refuse(refusal: Refusal, dialect: ModuleType) -> Response:
    """Make the answer of a request that is refused, in the words of its dialect."""
    body = dialect.error(refusal, request_id.get() or "")
    headers = {}
    if refusal.retry_after is not None:
        headers["retry-after"] = str(max(1, round(refusal.retry_after)))
    if refusal.status == 401:
        headers["www-authenticate"] = "Bearer"
    return Response(
        msgspec.json.encode(body), refusal.status, headers, media_type="application/json"
    )


async def refuse_unknown(request: Request, error: Exception) -> Response:
    """Make the answer of a path or method that there is not."""
    assert isinstance(error, HTTPException)
    words = {404: "there is no such path", 405: f"{request.method} is not for this path"}
    message = words.get(error.status_code, error.detail)
    note(request, error=message)
    response = refuse(Refusal(error.status_code, message), dialect_of(request.url.path))
    response.headers.update(error.headers or {})
    return response


class Envelope:
    """This is the outermost layer of the application."""

    def __init__(
        self, app: ASGIApp, *, keys: Keys, metrics: Metrics, routes: frozenset[str]
    ) -> None:
        """``routes`` are paths that the metrics tell apart."""
        self.app, self.keys, self.metrics, self.routes = app, keys, metrics, routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request; nothing is raised but what ends the task itself."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status, path = time.perf_counter(), 0, scope["path"]
        headers = Headers(scope=scope)
        own = choose_id(headers.get("x-request-id"))
        token = request_id.set(own)
        fields = scope.setdefault(_FIELDS, {})

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = own
            await send(message)

        try:
            if path not in OPEN and not self.keys.accept(headers.get("authorization")):
                raise Refusal(401, "no such API key", code="invalid_api_key")
            await self.app(scope, receive, send_with_id)
        except Refusal as refusal:
            fields["error"] = str(refusal)
            await refuse(refusal, dialect_of(path))(scope, receive, send_with_id)
        except Exception:
            _logger.exception("a request failed")
            if not status:
                failed = Refusal(500, f"the server failed; its log has more under {own}")
                await refuse(failed, dialect_of(path))(scope, receive, send_with_id)
        finally:
            seconds = time.perf_counter() - start
            route = path if path in self.routes else "other"
            self.metrics.answered(route, status, seconds)
            line = {"method": scope["method"], "path": path[:200], "status": status}
            line |= {"seconds": round(seconds, 6), "client": (scope.get("client") or ("",))[0]}
            level = logging.DEBUG if path in OPEN and status == 200 else logging.INFO
            _logger.log(level, "answered", extra={"fields": {**line, **fields}})
            request_id.reset(token)
