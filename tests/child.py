"""The command line in a process of its own, forked from one that has imported it already.

Python and torch take seconds to start; a fork server pays that once for all the commands of a test.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from gpt_ext.cli import COMMANDS

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["gpt_ext.cli", *(f"gpt_ext.commands.{name}" for name in COMMANDS)])


def run(arguments: Sequence[str], timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Exit code, stdout and stderr of `gpt-ext` with these arguments."""
    with TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("stdout", "stderr")]
        process = SERVER.Process(target=_command, args=(arguments, files))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise TimeoutError(f"gpt-ext {' '.join(arguments)} took more than {timeout} s")
        stdout, stderr = (path.read_text(encoding="utf-8") for path in files)
        return subprocess.CompletedProcess(arguments, process.exitcode, stdout, stderr)


def _command(arguments: Sequence[str], files: Sequence[Path]) -> None:
    for number, path in enumerate(files, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    from gpt_ext import cli

    torch.set_num_threads(1)  # the tests' models gain nothing from more
    sys.exit(cli.main(arguments))
