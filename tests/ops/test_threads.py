"""In a thread that is new to torch, each op uses as many threads as torch is told."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from decoder import Model
from every_op import OPS

from gpt_ext.ops import decode, embedding

MAPS = Path("/proc/self/maps")


def openmp() -> Any:
    """The OpenMP library that torch has loaded."""
    paths = {line.split()[-1] for line in MAPS.read_text().splitlines() if "libgomp" in line}
    return ctypes.CDLL(paths.pop())


def calls() -> dict[str, Callable[[], Any]]:
    """One of each op's kernels, with inputs that are there already."""
    found: dict[str, Callable[[], Any]] = {}
    for name, op in OPS.items():
        inputs = [t.detach() for t in op.inputs("cpu")]
        found[name] = lambda op=op, inputs=inputs: op.call(*inputs)
    tokens, table = torch.zeros(1, 1, dtype=torch.int64), torch.ones(2, 3)
    found["embedding"] = lambda: embedding(tokens, table, table[:1])
    model = Model()
    packed, cache, rows = model.packed(), model.cache(1), torch.zeros(3, 1, dtype=torch.int64)
    x = torch.empty(1, decode.aligned(model.dim))
    weights, heads = model.weights, model.heads
    found["fingerprint"] = lambda: torch.ops.gpt_ext.decode_fingerprint(weights)
    found["pack"] = lambda: torch.ops.gpt_ext.decode_pack(weights, heads, 0, 0, 1e-5)
    found["forward"] = lambda: decode.forward(x, packed, cache, rows, 0, 1)
    found["generate"] = lambda: decode.generate(packed, cache, rows, 1, 1)
    return found


@pytest.mark.skipif(not MAPS.exists(), reason="the system has no /proc")
def test_a_new_thread_hears_of_set_num_threads() -> None:
    count = openmp().omp_get_max_threads
    torch.set_num_threads(1)
    for name, call in calls().items():
        seen = []

        def run(call: Callable[[], Any] = call, seen: list[int] = seen) -> None:
            call()
            seen.append(count())

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        assert seen == [1], name
