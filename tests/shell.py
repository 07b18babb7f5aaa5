"""`gpt-ext` as tests call it, in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import child

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
SMALL = (
    *("--context-length", "16", "--model-dim", "16", "--num-blocks", "1", "--num-heads", "2"),
    *("--batch-size", "4", "--eval-batches", "2", "--warmup-steps", "2"),
)
COMMAND = (sys.executable, "-m", "gpt_ext")


def gpt_ext(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return child.run([*map(str, arguments)])


def open_gpt_ext(*arguments: str | Path, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        **{
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
            "encoding": "utf-8",
            "env": ENVIRONMENT,
        } | options,
    )  # fmt: skip


def assert_one_error(result: subprocess.CompletedProcess[str], message: str) -> None:
    """One line on stderr, exit code 2, nothing on stdout."""
    assert re.fullmatch(rf"gpt-ext: error: .*{message}.*\n", result.stderr), result.stderr
    assert result.returncode == 2
    assert result.stdout == ""
