"""Times gpt_ext.ops against PyTorch: eager, scaled_dot_product_attention and torch.compile.

On CUDA also against each of SDPA's backends; eager's products are cuBLAS's there. What is timed
there is the device's work: calls captured in a graph, for everybody.

    python benchmarks/bench_ops.py [--device cpu|cuda] [--dtypes DTYPE...] [--ops OP...]
                                   [--shape NAME] [--no-compile] [--rounds N] [--budget S]
                                   [--json FILE] [--record]

Each case is first checked: our error against float64 is held against eager PyTorch's. Then, round
after round, all contestants are timed in turn, so that a change of the machine's mood meets all of
them; the figures are medians over the rounds, the ratio is the median of each round's ratio.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from contest import (
    OURS,
    Report,
    Timer,
    add_options,
    cell,
    figures,
    first_line,
    in_graph,
    in_process,
    our_cell,
    table,
    time_in_turn,
)
from op_cases import CASES, SDPA_BACKENDS, Call, Case, Maker
from torch import Tensor

PEERS = ("eager", "SDPA", "compile")
KEYS = ["op", "shape", "dtype", "direction"]
DTYPES = {
    "float32": torch.float32,
    "tf32": torch.float32,  # on CUDA, where torch is told to allow it, for everybody
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
EPS = {name: torch.finfo(dtype).eps for name, dtype in DTYPES.items()} | {"tf32": 2**-10}


def peers(device: str) -> tuple[str, ...]:
    return (*PEERS, *SDPA_BACKENDS) if device == "cuda" else PEERS


def results_of(call: Call, inputs: tuple[Tensor, ...], dout: Tensor) -> list[Tensor]:
    """The output and the inputs' gradients."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = call(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def check(case: Case, eps: float) -> None:
    """Raises if our largest error against float64 is beyond twice eager's, plus a few roundings."""
    eager, ours, inputs = case.eager, case.calls[OURS], case.checked
    dout = torch.randn_like(eager(*inputs))
    exact = results_of(eager, tuple(x.double() for x in inputs), dout.double())
    theirs, mine = results_of(eager, inputs, dout), results_of(ours, inputs, dout)
    for i, (e, t, m) in enumerate(zip(exact, theirs, mine, strict=True)):
        floor = 4 * eps * e.abs().max().item()
        bound = 2 * (t - e).abs().max().item() + floor
        error = (m - e).abs().max().item()
        if not error <= bound:
            name = "out" if i == 0 else f"gradient of input {i - 1}"
            sys.exit(f"{case.op} {case.shape} {m.dtype}: {name} is off by {error}, bound {bound}")


def timers(case: Case, call: Call, device: str) -> dict[str, Timer]:
    """Of what is timed: forward without autograd, and forward with backward."""
    leaves = [x.detach().requires_grad_() for x in case.inputs]
    with torch.no_grad():
        dout = torch.randn_like(call(*case.inputs))

    def forward() -> None:
        with torch.no_grad():
            call(*case.inputs)

    def both() -> None:
        torch.autograd.grad(call(*leaves), leaves, dout)

    runs: dict[str, Callable[[], Any]] = {"forward": forward, "forward+backward": both}
    for run in runs.values():
        run()
    time = in_graph if device == "cuda" else in_process
    return {direction: time(run) for direction, run in runs.items()}


def runnable(case: Case, options: argparse.Namespace) -> dict[str, dict[str, Timer]]:
    """Everyone's timers, without who does not work on this machine or takes no such shape."""
    timed = {}
    for name, call in case.calls.items():
        if name == "compile" and options.no_compile:
            continue
        try:
            timed[name] = timers(case, call, options.device)
        except Exception as error:  # whatever the compiler chain throws: left out, with a word
            if name not in {"compile", *SDPA_BACKENDS}:
                raise
            print(f"{name} left out: {first_line(error)}")
    return timed


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for dtype in options.dtypes:
        torch.backends.cuda.matmul.allow_tf32 = dtype == "tf32"
        make = Maker(options.device, DTYPES[dtype])
        for case in (case for op in options.ops for case in CASES[op](make)):
            if not case.shape.startswith(options.shape):
                continue
            torch.compiler.reset()  # it gives up on a function after a few shapes
            check(case, EPS[dtype])
            timed = runnable(case, options)
            for direction in ("forward", "forward+backward"):
                contestants = {name: each[direction] for name, each in timed.items()}
                samples = time_in_turn(contestants, options.rounds, options.budget)
                yield {
                    "op": case.op,
                    "shape": case.shape,
                    "dtype": dtype,
                    "direction": direction,
                    "contestants": figures(samples),
                }


def cells(result: dict[str, Any], device: str) -> list[str]:
    contestants = result["contestants"]
    return [
        *(result[key] for key in KEYS),
        our_cell(contestants[OURS], 1e6),
        *(cell(contestants.get(peer), 1e6) for peer in peers(device)),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Times gpt_ext.ops against PyTorch.")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    parser.add_argument("--ops", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--shape", default="", help="only shapes whose name begins with this")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile")
    add_options(parser, rounds=11, budget=20)
    options = parser.parse_args()

    torch.manual_seed(0)
    report = Report("bench_ops", options, device=options.device)
    for result in measure(options):
        report.add(result, cells(result, options.device))
    rows = [cells(result, options.device) for result in report.results]
    report.finish(table([*KEYS, "gpt_ext, us", *peers(options.device)], rows))


if __name__ == "__main__":
    main()
