"""`gpt-ext serve`: a run's model behind HTTP, for OpenAI's clients and for a browser."""

from __future__ import annotations

import ipaddress
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt_ext import engine, pretrained
from gpt_ext.commands import Parser, picked
from gpt_ext.errors import UserError
from gpt_ext.generation import WeightFormat
from gpt_ext.serve.options import ServeOptions

if TYPE_CHECKING:
    from starlette.applications import Starlette


def parser() -> Parser:
    """Of the run, the address, and the limits."""
    parser = Parser(description="Serves a run's model: OpenAI's /v1/completions, and a page.")
    parser.add_argument("run", type=str, help="the folder of a run, or of a model")
    parser.add_argument("--host", type=str, default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on; 0: any free one")
    parser.add_argument(
        "--token", type=str, help="what clients must know; needed for any host but loopback"
    )
    parser.add_argument("--dtype", type=WeightFormat, default="float32", help="of the weights")
    parser.add_fields(ServeOptions)
    parser.add_argument(
        "--grace", type=float, default=10.0, help="seconds to finish in when told to stop"
    )
    return parser


def run(options: Any) -> int:
    try:
        from gpt_ext.serve.app import create_app
    except ModuleNotFoundError as error:
        raise UserError(
            f"serving needs {error.name}, which is not installed: pip install 'gpt-ext[serve]'"
        ) from None
    check(options)
    folder = Path(options.run)
    model, tokenizer = pretrained.load_with_tokenizer(folder)
    sizes = picked(ServeOptions, options)
    try:
        app = create_app(
            model, tokenizer, folder, dtype=options.dtype, token=options.token, options=sizes
        )
    except engine.NotPlainError as error:
        raise UserError(f"{folder} can't be served: {error}") from None
    return listen(app, options.host, options.port, options.grace)


def check(options: Any) -> None:
    """UserError for what can't be served, or is not safe to."""
    for name in ("slots", "max_tokens", "max_body", "timeout"):
        if not getattr(options, name) > 0:
            raise UserError(f"{name} must be above 0, got {getattr(options, name)}")
    for name in ("queue", "grace"):
        if not getattr(options, name) >= 0:
            raise UserError(f"{name} must not be negative, got {getattr(options, name)}")
    if not 0 <= options.port < 2**16:
        raise UserError(f"port must be from 0 to {2**16 - 1}, got {options.port}")
    if options.token == "":
        raise UserError("token must not be empty")
    if options.token is None and not is_loopback(options.host):
        raise UserError(f"--host {options.host} can be reached by others: --token is needed")


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen(app: Starlette, host: str, port: int, grace: float) -> int:
    """Serves until SIGTERM or Ctrl-C; what is under way then has `grace` seconds to finish.

    A second of these ends the grace.
    """
    import uvicorn

    class Server(uvicorn.Server):
        """Goes on answering, new completions with 503, until all is done or the grace is over."""

        leave_by: float | None = None

        def handle_exit(self, sig: int, frame: Any) -> None:
            now = time.monotonic()
            self.leave_by = now + grace if self.leave_by is None else now
            app.state.scheduler.closing = True

        async def on_tick(self, counter: int) -> bool:
            if self.leave_by is not None:
                if time.monotonic() > self.leave_by:
                    app.state.scheduler.end()
                self.should_exit = app.state.scheduler.idle
            return await super().on_tick(counter)

        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            if self.started:
                where = self.servers[0].sockets[0].getsockname()
                print(f"serving on http://{host}:{where[1]}", flush=True)

    config = uvicorn.Config(
        app, host, port, log_level="warning", access_log=False, timeout_graceful_shutdown=1,
        ws="none",
    )  # fmt: skip
    server = Server(config)
    try:
        server.run()
    except SystemExit:
        raise UserError(f"can't listen on {host}:{port}") from None
    return 0 if server.started else 2
