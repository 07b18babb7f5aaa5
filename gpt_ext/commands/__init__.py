"""The commands of `gpt-ext`, a module each: `parser()` reads its options, `run()` does it."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any, NoReturn, get_type_hints

import jsonargparse


class Parser(jsonargparse.ArgumentParser):
    """Tells a bad command line as any other error."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        sys.exit(fail(message))

    def add_fields(self, options: Any) -> None:
        """An argument for each field of a dataclass that has a line of help."""
        types = get_type_hints(options)
        for field in dataclasses.fields(options):
            if "help" in field.metadata:
                self.add_argument(
                    f"--{field.name.replace('_', '-')}",
                    type=types[field.name],
                    default=field.default,
                    help=field.metadata["help"],
                )


def picked(kind: Callable[..., Any], options: Any) -> Any:
    """The dataclass `kind` from those options that are its fields."""
    return kind(**{field.name: options[field.name] for field in dataclasses.fields(kind)})  # type: ignore[arg-type]


def fail(message: str) -> int:
    """Tells a user's error, in one line; returns its exit code."""
    print(f"gpt-ext: error: {' '.join(message.split())}", file=sys.stderr)
    return 2
