"""The commands of `gpt-ext`, a module each: `parser()` reads its options, `run()` does it."""

from __future__ import annotations

import sys
from typing import NoReturn

import jsonargparse


class Parser(jsonargparse.ArgumentParser):
    """Tells a bad command line as any other error."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        sys.exit(fail(message))


def fail(message: str) -> int:
    """Tells a user's error, in one line; returns its exit code."""
    print(f"gpt-ext: error: {' '.join(message.split())}", file=sys.stderr)
    return 2
