"""The page in the browser."""

from __future__ import annotations

from pathlib import Path

from starlette.routing import Route

from gpt_ext.model import GPT
from gpt_ext.tokenizer import Tokenizer


def routes(model: GPT, tokenizer: Tokenizer, run: Path) -> list[Route]:
    """None yet."""
    return []
