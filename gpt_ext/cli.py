"""The command `gpt-ext`: finds the command that is asked for, and tells its errors."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from gpt_ext.commands import Parser, fail
from gpt_ext.errors import UserError

# Each is a module of gpt_ext.commands, which is loaded for its own command only.
COMMANDS = {
    "prepare": "text files -> data set",
    "train": "text file or data set -> run",
    "generate": "run or model -> text",
    "serve": "run or model -> OpenAI's API, and a page to play with",
    "convert": "run or model -> other formats",
    "inspect": "what a run's model takes",
    "attention": "run or model -> a picture of what its heads look at",
    "demo": "about a minute, from nothing to text",
    "doctor": "what this installation can do",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, 2 for a user's error, 130 for Ctrl-C."""
    if sys.stdout is not None:  # it may be closed
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] not in COMMANDS:
        if words and words[0].startswith("-"):
            overview().parse_args(words)  # shows the help, or fails
        given = repr(words[0]) if words else "none"
        return fail(f"expected a command, one of {', '.join(COMMANDS)}; got {given}")
    try:
        command = import_module(f"gpt_ext.commands.{words[0]}")
        parser: Parser = command.parser()
        parser.prog = f"gpt-ext {words[0]}"
        code: int = command.run(parser.parse_args(words[1:]))
        return code
    except UserError as error:
        return fail(str(error))
    except OSError as error:
        # What print could not write would fail again when Python flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        # The reader of our output may go when it has enough, as in `gpt-ext ... | head`.
        return 1 if isinstance(error, BrokenPipeError) else fail(str(error))
    except KeyboardInterrupt:
        return 130


def overview() -> Parser:
    """The parser that knows the commands' names, and nothing of their options."""
    parser = Parser(prog="gpt-ext", description="A GPT from text, and text from a GPT.")
    commands = parser.add_subcommands()
    for name, line in COMMANDS.items():
        commands.add_subcommand(name, Parser(), help=line)
    return parser
