"""What every route of the endpoint does with a request's body and with an error."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from gpt_ext.serve.completions import ApiError


async def whole_body(request: Request, most: int) -> bytes:
    """The body; ApiError 413 for one of more than `most` bytes."""
    body = bytearray()
    with suppress(ClientDisconnect):
        async for part in request.stream():
            body += part
            if len(body) > most:
                raise ApiError(413, f"the body must be of at most {most} bytes")
    return bytes(body)


class ErrorResponse(JSONResponse):
    """In ASCII: an error may name what no UTF-8 can, half a character of a request's JSON."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content).encode()


def error_response(error: ApiError) -> Response:
    return ErrorResponse(error.body(), error.status)
