"""`gpt-ext doctor`: what this installation can do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gpt_ext.build import build_info
from gpt_ext.commands import Parser
from gpt_ext.errors import UserError


def parser() -> Parser:
    return Parser(description=run.__doc__)


def run(options: Any) -> int:
    """Tells what was built, with which torch and compiler, and what runs here."""
    try:
        _print_tree(build_info())
    except RuntimeError as error:  # GPT_EXT_SIMD names no level of this machine
        raise UserError(str(error)) from None
    return 0


def _print_tree(tree: Mapping[str, Any], indent: str = "") -> None:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            print(f"{indent}{key}:")
            _print_tree(value, indent + "  ")
        else:
            shown = ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
            print(f"{indent}{key}: {shown}")
