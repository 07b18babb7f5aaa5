"""The endpoint: routes, limits and errors around the scheduler."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gpt_ext.engine import engine_for
from gpt_ext.generation import check_overflow
from gpt_ext.model import GPT
from gpt_ext.sequences import Slots
from gpt_ext.serve import page
from gpt_ext.serve.completions import Answer, ApiError, Completion, Limits, event, parse
from gpt_ext.serve.http import error_response, whole_body
from gpt_ext.serve.metrics import CONTENT_TYPE, Metrics
from gpt_ext.serve.options import ServeOptions
from gpt_ext.serve.scheduler import ClosingError, FullError, Progress, Scheduler
from gpt_ext.tokenizer import Tokenizer

STALL_SECONDS = 0.8  # a reader that takes nothing for so long is gone


class Service:
    """A model being served: what the routes share."""

    def __init__(
        self, model: GPT, tokenizer: Tokenizer, name: str, options: ServeOptions, dtype: Any
    ) -> None:
        config = model.config
        window = config.context_length
        stride = check_overflow(options.overflow, None, window)
        stop = () if tokenizer.end is None else (tokenizer.end,)
        slots = Slots(engine_for(model, dtype), options.slots, window, window, stride, stop)
        self.scheduler = Scheduler(slots, options.queue)
        self.limits = Limits(window, options.max_tokens, options.slots, config.vocab_size)
        self.tokenizer, self.name, self.options = tokenizer, name, options
        self.metrics, self.created = Metrics(), int(time.time())

    @asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        self.scheduler.start()
        yield
        await asyncio.to_thread(self.scheduler.stop)

    async def completions(self, request: Request) -> Response:
        try:
            body = await whole_body(request, self.options.max_body)
            completion = parse(body, self.tokenizer, self.name, self.limits)
            call = Call(self, completion)
            call.begin()
        except ApiError as error:
            self.metrics.requests[error.status] += 1
            return error_response(error)
        return call

    async def models(self, request: Request) -> Response:
        model = {
            "id": self.name, "object": "model", "created": self.created, "owned_by": "gpt_ext",
        }  # fmt: skip
        return JSONResponse({"object": "list", "data": [model]})

    async def health(self, request: Request) -> Response:
        closing = self.scheduler.closing
        return JSONResponse({"status": "closing" if closing else "ok"}, 503 if closing else 200)

    async def metrics_page(self, request: Request) -> Response:
        scheduler = self.scheduler
        text = self.metrics.text(len(scheduler.running), len(scheduler.waiting), scheduler.count)
        return PlainTextResponse(text, media_type=CONTENT_TYPE)


class StalledError(Exception):
    """The reader takes nothing."""


class Call(Response):
    """A completion under way, and the response that tells it, whole or as server-sent events.

    It ends its sequences however it ends: done, timed out, or left by the client.
    """

    def __init__(self, service: Service, request: Completion) -> None:
        self.service, self.request = service, request
        self.answer = Answer(request, service.tokenizer, service.name)
        self.start = time.perf_counter()
        self.deadline = self.start + service.options.timeout
        self.news: list[int] = []  # choices that have something new
        self.failed = self.left = False
        self.wake = asyncio.Event()
        self.tickets = request.tickets(self._delivery)
        self.status_code = 200  # that the client is told

    def begin(self) -> None:
        """Into the queue; ApiError where there is no room."""
        try:
            self.service.scheduler.submit(self.tickets)
        except FullError:
            raise ApiError(429, "too many requests are waiting; try again later") from None
        except ClosingError:
            raise ApiError(503, "the server is closing") from None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        leaving = asyncio.create_task(self._watch(receive))
        try:
            await (self._stream(scope, send) if self.request.stream else self._whole(scope, send))
        except StalledError:
            self.left = True
        finally:
            leaving.cancel()
            self.service.scheduler.cancel(self.tickets)
            self._count()

    async def _stream(self, scope: Scope, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-store")]
        started = False
        while True:
            error = await self._news()
            if self.left:
                return
            if not started:
                if error:  # nothing is sent yet: a status can still tell it
                    await self._fail(error, scope, send)
                    return
                await send({"type": "http.response.start", "status": 200, "headers": headers})
                started = True
            body = event(error.body()) if error else self._events()
            over = error is not None or self.answer.done
            if body or over:
                message = {"type": "http.response.body", "body": body, "more_body": not over}
                await self._send(send, message)
            if over:
                return

    async def _send(self, send: Send, message: Message) -> None:
        """Sends; StalledError where that takes too long. asyncio.wait_for would make a task."""
        task, loop, stalled = asyncio.current_task(), asyncio.get_running_loop(), False

        def stall() -> None:
            nonlocal stalled
            stalled = True
            assert task is not None
            task.cancel()

        timer = loop.call_later(STALL_SECONDS, stall)
        try:
            await send(message)
        except asyncio.CancelledError:
            if stalled:
                raise StalledError from None
            raise
        finally:
            timer.cancel()

    async def _whole(self, scope: Scope, send: Send) -> None:
        while not self.answer.done:
            error = await self._news()
            if self.left:
                return
            if error:
                await self._fail(error, scope, send)
                return
        await JSONResponse(self.answer.whole())(scope, no_receive, send)

    async def _fail(self, error: ApiError, scope: Scope, send: Send) -> None:
        self.status_code = error.status
        await error_response(error)(scope, no_receive, send)

    async def _news(self) -> ApiError | None:
        """Waits for something new; the error that ends the call, if that is what comes."""
        left = self.deadline - time.perf_counter()
        timer = asyncio.get_running_loop().call_later(max(0, left), self.wake.set)
        await self.wake.wait()
        timer.cancel()
        self.wake.clear()
        if self.failed:
            return ApiError(500, "the engine failed or was stopped")
        if time.perf_counter() >= self.deadline and not self.answer.done:
            seconds = self.service.options.timeout
            return ApiError(503, f"the request took more than {seconds:g} s")
        return None

    def _events(self) -> bytes:
        news, self.news = self.news, []
        return self.answer.events(news)

    def _delivery(self, index: int) -> Callable[[Progress], None]:
        def deliver(progress: Progress) -> None:
            if progress.finish == "error":
                self.failed = True
            else:
                self._add(index, progress)
            self.wake.set()

        return deliver

    def _add(self, index: int, progress: Progress) -> None:
        choice = self.answer.choices[index]
        if choice.done:
            return
        if not any(each.tokens for each in self.answer.choices):
            self.service.metrics.first_token.observe(time.perf_counter() - self.start)
        if index not in self.news:
            self.news.append(index)
        if choice.add(progress):
            self.service.scheduler.cancel([self.tickets[index]])

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.left = True
        self.service.scheduler.cancel(self.tickets)
        self.wake.set()

    def _count(self) -> None:
        metrics, usage = self.service.metrics, self.answer.usage()
        metrics.requests[self.status_code] += 1
        metrics.prompt_tokens += usage["prompt_tokens"]
        metrics.completion_tokens += usage["completion_tokens"]
        metrics.disconnects += self.left
        metrics.duration.observe(time.perf_counter() - self.start)


async def no_receive() -> Message:
    raise AssertionError("a JSON response reads nothing")


class BearerToken:
    """Lets those in who know the token; health and the page's own files are for everybody."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self.app, self.expected = app, f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not is_public(scope["path"]):
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self.expected):
                error = ApiError(401, "a token is needed: Authorization: Bearer TOKEN")
                await error_response(error)(scope, receive, send)
                return
        await self.app(scope, receive, send)


def is_public(path: str) -> bool:
    return path in ("/", "/health") or path.startswith("/static/")


def create_app(
    model: GPT,
    tokenizer: Tokenizer,
    run: Path,
    *,
    dtype: Any = "float32",
    token: str | None = None,
    options: ServeOptions | None = None,
) -> Starlette:
    """The application that serves a run's model, under the name of the run's folder.

    Its `state.scheduler` is what writes. Raises NotPlainError for a model that the engine cannot
    take (gpt_ext.engine).
    """
    name = run.resolve().name
    service = Service(model, tokenizer, name, options or ServeOptions(), dtype)
    routes: list[BaseRoute] = [
        Route("/v1/completions", service.completions, methods=["POST"]),
        Route("/v1/models", service.models),
        Route("/health", service.health),
        Route("/metrics", service.metrics_page),
        *page.routes(model, tokenizer, run),
    ]
    middleware = [Middleware(BearerToken, token=token)] if token else []
    errors = {404: http_error, 405: http_error}
    app = Starlette(
        routes=routes, middleware=middleware, lifespan=service.lifespan, exception_handlers=errors
    )
    app.state.scheduler = service.scheduler
    return app


async def http_error(request: Request, error: Exception) -> Response:
    status: int = error.status_code  # type: ignore[attr-defined]
    return error_response(ApiError(status, f"{request.method} {request.url.path}: {error}"))
