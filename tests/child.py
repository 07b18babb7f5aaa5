"""The command line in a process of its own, forked from one that has imported it already.

Python and torch take seconds to start; a fork server pays that once for all the commands of a test.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from gpt_ext.cli import COMMANDS

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["gpt_ext.cli", *(f"gpt_ext.commands.{name}" for name in COMMANDS)])


def run(arguments: Sequence[str], timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Exit code, stdout and stderr of `gpt-ext` with these arguments."""
    return _run([{}], arguments, timeout)[0]


def start(arguments: Sequence[str]) -> multiprocessing.process.BaseProcess:
    """The process of `gpt-ext` with these arguments, whose output nobody sees."""
    process = SERVER.Process(target=_command, args=(arguments, [os.devnull, os.devnull], {}))
    process.start()
    return process


def run_job(
    processes: int, arguments: Sequence[str], timeout: float = 120
) -> list[subprocess.CompletedProcess[str]]:
    """The same of each of so many processes, which find what torchrun would tell them."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "job"}
    ranks = [{"RANK": i, "LOCAL_RANK": i, "WORLD_SIZE": processes} for i in range(processes)]
    return _run(
        [{k: str(v) for k, v in (job | rank).items()} for rank in ranks], arguments, timeout
    )


def _run(
    environments: Sequence[Mapping[str, str]], arguments: Sequence[str], timeout: float
) -> list[subprocess.CompletedProcess[str]]:
    with TemporaryDirectory() as folder:
        processes = []
        for number, environment in enumerate(environments):
            files = [Path(folder) / f"{name}{number}" for name in ("stdout", "stderr")]
            process = SERVER.Process(target=_command, args=(arguments, files, environment))
            process.start()
            processes.append((process, files))
        for process, _ in processes:
            process.join(timeout)
        if any(process.exitcode is None for process, _ in processes):
            for process, _ in processes:
                process.kill()
            raise TimeoutError(f"gpt-ext {' '.join(arguments)} took more than {timeout} s")
        return [
            subprocess.CompletedProcess(
                arguments, process.exitcode, *(path.read_text(encoding="utf-8") for path in files)
            )
            for process, files in processes
        ]


def _command(
    arguments: Sequence[str], files: Sequence[Path | str], environment: Mapping[str, str]
) -> None:
    os.environ.update(environment)
    for number, path in enumerate(files, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    from gpt_ext import cli

    torch.set_num_threads(1)  # the tests' models gain nothing from more
    sys.exit(cli.main(arguments))
