"""The page in the browser: its files, and what it asks of the model beside completions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import BaseRoute, Route
from torch import Tensor

from gpt_ext import checkpoint
from gpt_ext.model import GPT
from gpt_ext.plots import attention_weights
from gpt_ext.serve.completions import ApiError, name_of, piece_of
from gpt_ext.serve.http import error_response, whole_body
from gpt_ext.tokenizer import CharTokenizer, Tokenizer

STATIC = Path(__file__).parent / "static"
FILES = {path.name: path for path in STATIC.iterdir()}
HEADERS = {"Content-Security-Policy": "default-src 'self'", "X-Content-Type-Options": "nosniff"}
MAX_BODY = 1 << 20  # bytes of a text to look at
LIKELIEST = 12
MAX_POINTS = 1000  # of a curve


def routes(model: GPT, tokenizer: Tokenizer, run: Path) -> list[BaseRoute]:
    """The page of a run: / and /static, and /api/model, /api/losses, /api/look."""
    page = Page(model, tokenizer, run)
    return [
        Route("/", file),
        Route("/static/{name}", file),
        Route("/api/model", page.about),
        Route("/api/losses", page.losses),
        Route("/api/look", page.look, methods=["POST"]),
    ]


async def file(request: Request) -> Response:
    """One of the files that came with the package, and no other."""
    path = FILES.get(request.path_params.get("name", "index.html"))
    if path is None:
        return answered(error_response(ApiError(404, f"there is no {request.url.path}")))
    return FileResponse(path, headers=HEADERS | {"Cache-Control": "no-cache"})


def answered(response: Response) -> Response:
    response.headers.update(HEADERS)
    return response


class Page:
    """A model that is looked at."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, run: Path) -> None:
        self.model, self.tokenizer, self.run = model, tokenizer, run

    async def about(self, request: Request) -> Response:
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

    def losses(self, request: Request) -> Response:
        records = checkpoint.read_lines(self.run / checkpoint.METRICS)
        curves = {"train": curve(records, "loss"), "validation": curve(records, "validation_loss")}
        return JSONResponse(curves, headers=HEADERS)

    async def look(self, request: Request) -> Response:
        try:
            text, position = parse(await whole_body(request, MAX_BODY))
            return JSONResponse(await run_in_threadpool(self.see, text, position), headers=HEADERS)
        except ApiError as error:
            return answered(error_response(error))

    def see(self, text: str, position: int) -> dict[str, Any]:
        """What the model thought at a token of `text`; ApiError where it can't be said."""
        try:
            tokens = self.tokenizer.encode(text)
        except ValueError as error:
            raise ApiError(400, f"text: {error}", "text") from None
        if not 1 <= position < len(tokens):
            message = f"position must be from 1 to {len(tokens) - 1}, got {position}"
            why = "; nothing comes before the first token" if position == 0 else ""
            raise ApiError(400, message + why, "position")
        start = max(0, position - self.model.config.context_length)
        seen, chosen = tokens[start:position], int(tokens[position])
        weights = attention_weights(self.model, seen)[:, :, -1]  # (layers, heads, T)
        probabilities = next_probabilities(self.model, seen)
        likeliest = probabilities.argsort(descending=True, stable=True).tolist()
        text_of = self.tokenizer.stream()

        def named(token: int) -> dict[str, Any]:
            text = name_of(self.tokenizer, token)
            return {"text": text, "probability": float(probabilities[token])}

        return {
            "pieces": [piece_of(text_of, token) for token in tokens.tolist()],
            "start": start,
            "position": position,
            "chosen": named(chosen) | {"rank": likeliest.index(chosen) + 1},
            "likeliest": [named(token) for token in likeliest[:LIKELIEST]],
            "attention": weights.tolist(),
        }


def parse(body: bytes) -> tuple[str, int]:
    """Text and position of a request; ApiError 400 says what is wrong with it."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ApiError(400, "the body must be a JSON object")
    text, position = fields.get("text"), fields.get("position")
    if not isinstance(text, str):
        raise ApiError(400, "text must be a string", "text")
    if type(position) is not int:
        raise ApiError(400, "position must be an integer", "position")
    return text, position


@torch.no_grad()
def next_probabilities(model: GPT, tokens: Tensor) -> Tensor:
    """How likely each token of the vocabulary is after `tokens` (T,): (V,) float32."""
    return model(tokens[None])[0, -1].float().softmax(-1)


def curve(records: Sequence[Mapping[str, Any]], key: str) -> list[list[float]]:
    """[step, value] of the records that have a finite one; every nth of them if they are many."""
    points = [[r["step"], r[key]] for r in records if r.get(key) is not None]
    return points[:: -(-len(points) // MAX_POINTS) or 1]
