"""Text to train on, made up on the spot."""

from __future__ import annotations

import random

WORDS = ("a", "the", "red", "old", "small", "king", "fox", "sees", "takes", "river", "over", "and")


def sentences(characters: int) -> str:
    """Random sentences of WORDS, one a line: easy to learn something about, hard to know."""
    draw = random.Random(0)
    lines = []
    while sum(map(len, lines)) < characters:
        lines.append(" ".join(draw.choices(WORDS, k=draw.randint(3, 8))).capitalize() + ".\n")
    return "".join(lines)[:characters]
