"""The peak memory of a call, measured in a child process of its own (Linux)."""

from __future__ import annotations

import ctypes
import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


def resident(field: str) -> int:
    """Bytes of this process: VmRSS now, or VmHWM, the most since the last reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def peak_of(run: Callable[[], Any]) -> int:
    """Bytes by which run() raises this process's memory at its highest above what it is before."""
    ctypes.CDLL(None).malloc_trim(0)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from VmRSS
    run()
    return resident("VmHWM") - before


def send_peak(connection: Connection, make: Callable[..., Callable[[], Any]], *args: Any) -> None:
    connection.send(peak_of(make(*args)))


def peak_in_child(make: Callable[..., Callable[[], Any]], *args: Any) -> int:
    """Peak bytes of the call that make(*args) prepares, both in a new process."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    child = context.Process(target=send_peak, args=(there, make, *args))
    child.start()
    there.close()
    try:
        peak: int = here.recv()
    except EOFError:
        raise RuntimeError(f"the child that measures {args} ended without a figure") from None
    finally:
        child.join()
    return peak
