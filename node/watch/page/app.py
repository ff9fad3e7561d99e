"""The page's web application: what is at which path, and who may ask for it.

GET  /                 the page; `/static/…` its parts. They hold nothing of the run, so anybody may have them
POST /api/login        {"secret": …} → a session, as a cookie, and the token for requests that change something
GET  /api/run          all that the page shows
GET  /api/stream       what changes, as server-sent events
GET  /api/trace        the steps that were recorded; /api/trace/STEP one of them, in Perfetto's format
GET  /api/network      what the network is now, as `isthmus net show` says it
POST /api/network      change it: {"cut": ["node-0", "node-1"]}, {"rate": "50 Mbit/s", "node": "node-2"}, …, with the
                       keys of `isthmus net`; the answer says which nodes have confirmed it
GET  /metrics          for Prometheus
GET  /healthz          "ok" while the records can be read
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
from sse_starlette import EventSourceResponse
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from coordinator.messages import Answer
from netem.changes import Change, ChangeConfig, change_of
from netem.config import convert
from netem.errors import ConfigError
from node.measure.trace_file import read_steps
from node.watch.page.access import Access, Role, Session, TooManyWrong
from node.watch.page.prometheus import exposition
from node.watch.page.source import Source
from node.watch.trace import trace

STATIC = Path(__file__).parent / "static"
MOST_BODY_BYTES = 16 << 10
STREAM_QUIET_S = 15.0
"""A stream without news says so after this time, and a proxy does not take it for dead."""

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}

Handler = Callable[[Request], Awaitable[Response]]
AskNetwork = Callable[[Change | None], Answer]
"""Asks the run's coordinator as an operator does (`coordinator.operator.ask`), and blocks meanwhile."""


class Page:
    """The handlers of one run's page. `ask` is None where the run is over: then nothing can be changed."""

    def __init__(self, folder: Path, source: Source, access: Access, cookie: str, ask: AskNetwork | None) -> None:
        self._folder, self._source, self._access, self._cookie, self._ask = folder, source, access, cookie, ask

    def application(self) -> ASGIApp:
        """The application with its guards."""
        routes = [
            Route("/", self.index),
            Mount("/static", StaticFiles(directory=STATIC)),
            Route("/api/login", self.log_in, methods=["POST"]),
            Route("/api/run", self._to_readers(self.run)),
            Route("/api/stream", self._to_readers(self.stream)),
            Route("/api/trace", self._to_readers(self.traces)),
            Route("/api/trace/{step:int}", self._to_readers(self.one_trace)),
            Route("/api/network", self._to_readers(self.show_network)),
            Route("/api/network", self.change_network, methods=["POST"]),
            Route("/metrics", self._to_readers(self.metrics)),
            Route("/healthz", self.health),
        ]
        errors = {TooManyWrong: _too_many_wrong, ConfigError: _mistake}
        return Starlette(
            routes=routes,
            middleware=[Middleware(Guard, access=self._access)],
            exception_handlers=errors,
            lifespan=self._lifespan,
        )

    @asynccontextmanager
    async def _lifespan(self, _app: Starlette) -> AsyncIterator[None]:
        follows = asyncio.create_task(self._source.follow())
        try:
            yield
        finally:
            follows.cancel()

    async def index(self, _request: Request) -> Response:
        return FileResponse(STATIC / "index.html")

    async def log_in(self, request: Request) -> Response:
        given = await _json(request)
        secret = given.get("secret")
        if not isinstance(secret, str):
            raise ConfigError('expected {"secret": …}')
        found = self._access.log_in(secret, time.monotonic())
        if found is None:
            return JSONResponse({"error": "this secret opens nothing here"}, 401)
        cookie, session = found
        response = JSONResponse(self._session(session))
        response.set_cookie(self._cookie, cookie, httponly=True, samesite="strict", path="/")
        return response

    async def run(self, request: Request) -> Response:
        session = self._access.session(request.cookies.get(self._cookie), time.monotonic())
        return JSONResponse(self._source.overview() | {"session": session and self._session(session)})

    async def stream(self, request: Request) -> Response:
        step = _number(request.query_params.get("after", "0"))
        return EventSourceResponse(self._events(request, step), ping=int(STREAM_QUIET_S))

    async def _events(self, request: Request, step: int) -> AsyncIterator[dict[str, str]]:
        seen = -1
        while not await request.is_disconnected():
            seen, news = await self._source.news(seen, step, STREAM_QUIET_S)
            if news is not None:
                step = news["header"]["step"]
                yield {"event": "news", "data": json.dumps(news, allow_nan=False)}

    async def traces(self, _request: Request) -> Response:
        try:
            steps = await run_in_threadpool(read_steps, self._folder)
        except ConfigError:
            return JSONResponse({"steps": []})
        return JSONResponse({"steps": sorted(steps)})

    async def one_trace(self, request: Request) -> Response:
        steps = await run_in_threadpool(read_steps, self._folder)
        step = request.path_params["step"]
        if step not in steps:
            raise ConfigError(f"step {step} was not recorded")
        return JSONResponse(trace(steps[step], self._folder.name))

    async def show_network(self, _request: Request) -> Response:
        return await self._answer(None)

    async def change_network(self, request: Request) -> Response:
        bearer, csrf = _bearer(request), request.headers.get("X-Isthmus-CSRF")
        cookie = request.cookies.get(self._cookie)
        if not self._access.may_change(cookie, bearer, csrf, time.monotonic()):
            return JSONResponse({"error": "the secret that lets you control is needed for this"}, 403)
        given = await _json(request)
        return await self._answer(change_of(convert(ChangeConfig, given, "change"), "change."))

    async def _answer(self, change: Change | None) -> Response:
        if self._ask is None:
            raise ConfigError("the run is over: its network can be neither asked nor changed")
        answer = await run_in_threadpool(self._ask, change)
        return JSONResponse(msgspec.to_builtins(answer))

    async def metrics(self, _request: Request) -> Response:
        return Response(exposition(self._source.state), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def health(self, _request: Request) -> Response:
        problem = self._source.problem
        return PlainTextResponse(problem or "ok", 503 if problem else 200)

    def _to_readers(self, handler: Handler) -> Handler:
        """The same handler for those who may read the page; others get 401."""

        async def guarded(request: Request) -> Response:
            role = self._access.role(request.cookies.get(self._cookie), _bearer(request), time.monotonic())
            if role < Role.READER:
                return JSONResponse({"error": "a secret is needed: open the address that the run has printed"}, 401)
            return await handler(request)

        return guarded

    def _session(self, session: Session) -> dict[str, Any]:
        return {"controls": session.role is Role.OPERATOR and self._ask is not None, "csrf": session.csrf}


class Guard:
    """Refuses requests for another host and changes from another site, and puts the security headers on each answer."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app, self._access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope)

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
                message["headers"] = [*message["headers"], *headers]
            await send(message)

        if not self._access.knows_host(request.headers.get("Host", "")):
            await JSONResponse({"error": "this host is not served here"}, 403)(scope, receive, send_guarded)
        elif request.method == "POST" and not self._access.is_own_origin(request.headers.get("Origin")):
            await JSONResponse({"error": "another site's request"}, 403)(scope, receive, send_guarded)
        else:
            await self._app(scope, receive, send_guarded)


async def _json(request: Request) -> dict[str, Any]:
    """The JSON object in a request's body. Raises `ConfigError`."""
    if request.headers.get("Content-Type", "").partition(";")[0].strip().lower() != "application/json":
        raise ConfigError("expected Content-Type: application/json")
    body = b""
    async for piece in request.stream():
        body += piece
        if len(body) > MOST_BODY_BYTES:
            raise ConfigError(f"the request is longer than {MOST_BODY_BYTES} bytes")
    try:
        given = json.loads(body)
    except (ValueError, RecursionError):
        raise ConfigError("the request is not JSON") from None
    if not isinstance(given, dict):
        raise ConfigError("expected a JSON object")
    return given


def _bearer(request: Request) -> str | None:
    kind, _, secret = request.headers.get("Authorization", "").partition(" ")
    return secret.strip() if kind.lower() == "bearer" else None


def _number(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 16):
        raise ConfigError("after: expected the number of a step")
    return int(text)


async def _mistake(_request: Request, error: Exception) -> Response:
    return JSONResponse({"error": str(error)}, 400)


async def _too_many_wrong(_request: Request, _error: Exception) -> Response:
    return JSONResponse({"error": "too many wrong secrets; wait a minute"}, 429)
