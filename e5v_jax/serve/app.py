"""The routes of the server."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from types import ModuleType
from typing import Any

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from e5v_jax.serve.auth import Keys
from e5v_jax.serve.dialects import cohere, embeddings, rerank, score, tokenize
from e5v_jax.serve.dialects.task import Refusal
from e5v_jax.serve.envelope import Envelope, dialect_of, note, refuse, refuse_unknown
from e5v_jax.serve.service import Service, unless_gone

Choose = Callable[[Mapping[str, Any]], ModuleType]
_EMBEDDING: dict[str, Choose] = {
    **dict.fromkeys(("/v1/embeddings", "/embeddings"), embeddings.choose),
    "/v2/embed": lambda _: cohere,
    **dict.fromkeys(("/v1/rerank", "/v2/rerank", "/rerank"), lambda _: rerank),
    **dict.fromkeys(("/score", "/v1/score"), lambda _: score),
}
"""Paths, and the dialect that a body is in."""
_INLINE = 2**16  # numbers that are printed in the event loop; more would hold up other requests


def make_app(service: Service, keys: Keys) -> Starlette:
    """The application of one server."""

    def post(
        path: str, answer: Callable[[Request, Service], Awaitable[Response]]
    ) -> tuple[str, Route]:
        async def endpoint(request: Request) -> Response:
            return await answer(request, service)

        return path, Route(path, endpoint, methods=["POST"])

    def get(path: str, read: Callable[[Service], Response]) -> tuple[str, Route]:
        async def endpoint(request: Request) -> Response:
            return read(service)

        return path, Route(path, endpoint, methods=["GET"])

    routes = dict(
        [
            *(post(path, partial(embed, choose=choose)) for path, choose in _EMBEDDING.items()),
            *(post(path, count_tokens) for path in ("/tokenize", "/v1/tokenize")),
            get("/v1/models", list_models),
            get("/live", live),
            get("/ready", ready),
            get("/metrics", metrics),
        ]
    )
    envelope = Middleware(Envelope, keys=keys, metrics=service.metrics, routes=frozenset(routes))
    return Starlette(
        routes=list(routes.values()),
        middleware=[envelope],
        exception_handlers={HTTPException: refuse_unknown},
    )


async def embed(request: Request, service: Service, *, choose: Choose) -> Response:
    """Answer a request for vectors, or for what is computed of them."""
    dialect = dialect_of(request.url.path)
    try:
        async with service.working(), service.admission.hold() as held:
            engine, model = service.opened()
            if engine.is_full:  # before its body is read
                raise Refusal(429, "too much is waiting", retry_after=engine.retry_after)
            body = read_json(await service.admission.read_body(request, held))
            dialect = choose(body)
            task = dialect.parse(body, model)
            embedded = await unless_gone(request.receive, service.embed(task.wanted, held))
            note(request, items=len(embedded), tokens=sum(one.tokens for one in embedded))
            if len(embedded) * model.dimensions <= _INLINE:
                return to_json(task.answer(embedded))
            return await asyncio.to_thread(lambda: to_json(task.answer(embedded)))
    except Refusal as refusal:
        note(request, error=str(refusal))
        return refuse(refusal, dialect)


async def count_tokens(request: Request, service: Service) -> Response:
    """Answer with the tokens of a text."""
    try:
        async with service.admission.hold() as held:
            engine, model = service.opened()
            body = read_json(await service.admission.read_body(request, held))
            processor = engine.model.processor
            return to_json(await asyncio.to_thread(tokenize.answer, body, model, processor))
    except Refusal as refusal:
        note(request, error=str(refusal))
        return refuse(refusal, tokenize)


def list_models(service: Service) -> Response:
    """OpenAI's list, with what clients of this server may want to know."""
    _, model = service.opened()
    about = {
        "object": "model",
        "created": model.created,
        "owned_by": "e5v-jax",
        "max_model_len": model.max_length,
        "dimensions": model.dimensions,
        "modalities": model.modalities,
    }
    return to_json({"object": "list", "data": [{"id": name, **about} for name in model.names]})


def live(service: Service) -> Response:
    """200, or 503 when a device call has failed and only a restart helps."""
    return _say("alive" if service.alive else "the device failed", good=service.alive)


def ready(service: Service) -> Response:
    """200, or 503 while the model is loaded, and from the first SIGTERM on."""
    return _say("ready" if service.ready else "not ready", good=service.ready)


def metrics(service: Service) -> Response:
    """What Prometheus reads."""
    return Response(service.metrics.print(), headers={"content-type": CONTENT_TYPE_LATEST})


def _say(words: str, *, good: bool) -> Response:
    return PlainTextResponse(f"{words}\n", 200 if good else 503)


def read_json(raw: bytes) -> dict[str, Any]:
    """A body as an object. Raises Refusal."""
    try:
        body = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Refusal(400, f"the body is not JSON: {error}") from None
    except RecursionError:
        raise Refusal(400, "the body is not JSON that can be read: nested too deeply") from None
    if not isinstance(body, dict):
        raise Refusal(400, "the body is not a JSON object")
    return body


def to_json(value: object) -> Response:
    """An answer."""
    return Response(msgspec.json.encode(value), media_type="application/json")
