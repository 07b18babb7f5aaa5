"""What a figure was measured on: every result carries this header."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import gpt_ext


def cpu_name() -> str:
    """The processor's name as Linux gives it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def machine() -> dict[str, Any]:
    """CPU, its cores and the threads in use, GPU if there is one, and the software."""
    info = gpt_ext.build_info()
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": info["device"],
        "simd_level": info["simd_level"],
        "compiler": info["compiler"],
        "torch": torch.__version__,
        "gpt_ext": info["version"],
        "system": f"{platform.system()}, Python {platform.python_version()}",
    }


def machine_line(facts: dict[str, Any]) -> str:
    """The header of a table, in one line."""
    gpu = f"{facts['gpu']}; " if facts["gpu"] else ""
    return (
        f"{gpu}{facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads, "
        f"{facts['simd_level']}; torch {facts['torch']}, gpt_ext {facts['gpt_ext']}, "
        f"{facts['compiler']}; {facts['system']}"
    )


def limits(*sizes: int) -> dict[str, Any] | None:
    """What the program `limits` of the native build measures now, on torch's number of threads.

    "float32_flops" and "bfloat16_flops" a second, and in "read" the bytes a second read from a
    working set of each of the `sizes`, in bytes. None where there is no native build.
    """
    programs = sorted(
        Path(__file__).parent.parent.glob("build/*/benchmarks/native/limits"),
        key=lambda program: program.stat().st_mtime,
    )
    if not programs:
        return None
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [str(programs[-1]), *map(str, sizes)]
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(output.stdout)
    return found | {"read": {int(size): rate for size, rate in found["read"].items()}}
