"""Text to train on, made up on the spot."""

from __future__ import annotations

import random
from pathlib import Path

WORDS = ("a", "the", "red", "old", "small", "king", "fox", "sees", "takes", "river", "over", "and")
SCRIPTS = "Grüße, 東京! 🌍\r\n\n\tx  = 12 345;\n\n  don't… «да» _a_b\n"


def sentences(characters: int) -> str:
    """Random sentences of WORDS, one a line: easy to learn something about, hard to know."""
    draw = random.Random(0)
    lines = []
    while sum(map(len, lines)) < characters:
        lines.append(" ".join(draw.choices(WORDS, k=draw.randint(3, 8))).capitalize() + ".\n")
    return "".join(lines)[:characters]


def mixed(characters: int) -> str:
    """Words, numbers, other scripts and white space of all kinds, in no order."""
    draw = random.Random(1)
    parts = [*sentences(2000).split(" "), *SCRIPTS.split(" "), *"   ", "\n", "\n\n", "\t\n "]
    words = [draw.choice(parts) + draw.choice((" ", " ", "\n", "")) for _ in range(characters)]
    return "".join(words)[:characters]


def written(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(text.encode())
    return path
