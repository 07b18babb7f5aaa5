"""The page in the browser: its files, and what it asks of the model beside completions."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import BaseRoute, Route
from torch import Tensor

from gpt_ext import checkpoint
from gpt_ext.model import GPT
from gpt_ext.plots import read
from gpt_ext.serve.completions import ApiError, kind_of, name_of, object_of
from gpt_ext.serve.http import error_response, whole_body
from gpt_ext.tokenizer import CharTokenizer, Tokenizer, piece_of

STATIC = Path(__file__).parent / "static"
FILES = {path.name: path for path in STATIC.glob("*")}
HEADERS = {"Content-Security-Policy": "default-src 'self'", "X-Content-Type-Options": "nosniff"}
MAX_BODY = 1 << 20  # bytes of a request
LIKELIEST = 12  # tokens that are told
MAX_POINTS = 1000  # of a curve


def routes(model: GPT, tokenizer: Tokenizer, run: Path) -> list[BaseRoute]:
    """The page of a run: / and /static, and /api/model, /api/losses, /api/look."""
    page = Page(model, tokenizer, run)
    return [
        Route("/", file),
        Route("/static/{name:path}", file),
        Route("/api/model", page.about),
        Route("/api/losses", page.losses),
        Route("/api/look", page.look, methods=["POST"]),
    ]


async def file(request: Request) -> Response:
    """One of the files that came with the package, and no other."""
    path = FILES.get(request.path_params.get("name", "index.html"))
    if path is None:
        return with_headers(error_response(ApiError(404, f"there is no {request.url.path}")))
    return FileResponse(path, headers=HEADERS | {"Cache-Control": "no-cache"})


def with_headers(response: Response) -> Response:
    response.headers.update(HEADERS)
    return response


class Page:
    """A model that is looked at, one look at a time: each takes all cores and much memory."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, run: Path) -> None:
        self.model, self.tokenizer, self.run = model, tokenizer, run
        self.turn = asyncio.Lock()

    async def about(self, request: Request) -> Response:
        """The model's name and sizes, and what its tokens are."""
        config = self.model.config
        characters = isinstance(self.tokenizer, CharTokenizer)
        return JSONResponse(
            {
                "name": self.run.resolve().name, "context": config.context_length,
                "layers": config.num_blocks, "heads": config.num_heads,
                "vocabulary": config.vocab_size, "unit": "character" if characters else "token",
            },
            headers=HEADERS,
        )  # fmt: skip

    async def losses(self, request: Request) -> Response:
        """The run's losses so far; none for a model that is no run."""
        records = await asyncio.to_thread(checkpoint.read_lines, self.run / checkpoint.METRICS)
        curves = {"train": curve(records, "loss"), "validation": curve(records, "validation_loss")}
        return JSONResponse(curves, headers=HEADERS)

    async def look(self, request: Request) -> Response:
        """What the model thought of a token of a text, and what it looked at."""
        try:
            text, position = parse(await whole_body(request, MAX_BODY))
            async with self.turn:
                if await request.is_disconnected():  # while it waited
                    return Response(status_code=499)
                seen = await asyncio.to_thread(self.see, text, position)
        except ApiError as error:
            return with_headers(error_response(error))
        return JSONResponse(seen, headers=HEADERS)

    @torch.inference_mode()
    def see(self, text: str, position: int) -> dict[str, Any]:
        """The answer to a look; ApiError where there can be none."""
        tokens = self.tokens(text, position)
        start = max(0, position - self.model.config.context_length)
        seen, chosen = tokens[start:position], int(tokens[position])
        attention, x = read(self.model, seen, slice(-1, None))  # (layers, heads, 1, T), (T, C)
        probabilities = self.model.logits(x[-1]).double().softmax(-1)  # (V,)
        if not (probabilities.isfinite().all() and attention.isfinite().all()):
            raise ApiError(500, "the model's logits are not finite: its weights are damaged")
        ranked = probabilities.argsort(descending=True, stable=True).tolist()
        text_of = self.tokenizer.stream()
        pieces = [piece_of(text_of, token) for token in tokens.tolist()]
        pieces[-1] += text_of(None)

        def named(token: int) -> dict[str, Any]:
            probability = probabilities[token].item()
            return {"text": name_of(self.tokenizer, token), "probability": probability}

        return {
            "pieces": pieces,
            "start": start,
            "position": position,
            "chosen": named(chosen) | {"rank": ranked.index(chosen) + 1},
            "likeliest": [named(token) for token in ranked[:LIKELIEST]],
            "attention": attention.squeeze(2).tolist(),
        }

    def tokens(self, text: str, position: int) -> Tensor:
        """The tokens of `text` (n,) int64; ApiError unless there is one at `position`, not 0."""
        try:
            tokens = self.tokenizer.encode(text)
        except ValueError as error:
            raise ApiError(400, f"text: {error}", "text") from None
        vocabulary = self.model.config.vocab_size
        if (tokens >= vocabulary).any():
            message = f"text: token id {tokens.max()} is beyond the model's {vocabulary} tokens"
            raise ApiError(400, message, "text")
        if position == 0:
            message = "position must be above 0: the model sees nothing before the first token"
            raise ApiError(400, message, "position")
        if not 0 < position < len(tokens):
            message = f"position must be that of one of the {len(tokens)} tokens, got {position}"
            raise ApiError(400, message, "position")
        return tokens


def parse(body: bytes) -> tuple[str, int]:
    """Text and position of a request; ApiError 400 says what is wrong with it."""
    fields = object_of(body)
    text, position = fields.get("text"), fields.get("position")
    if not isinstance(text, str):
        raise ApiError(400, f"text must be a string, got {kind_of(text)}", "text")
    if type(position) is not int:
        got = position if isinstance(position, float) else kind_of(position)
        raise ApiError(400, f"position must be an integer, got {got}", "position")
    return text, position


def curve(records: Sequence[Mapping[str, Any]], key: str) -> list[list[float]]:
    """[step, value] of the records that have a finite one; every nth of them if they are many."""
    points = [[r["step"], r[key]] for r in records if r.get(key) is not None]
    return points[:: -(-len(points) // MAX_POINTS) or 1]
