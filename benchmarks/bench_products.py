"""Times the matrix products of a training step, each orientation, against the measured peak.

    python benchmarks/bench_products.py [--dtypes float32 bfloat16] [--rounds N] [--budget S]
                                        [--json FILE] [--record]

Of a linear layer with weight W (o, d): forward x W^T (NT), the gradient of its input g W (NN), and
that of its weight g^T x (TN). GPT_EXT_SIMD forces a level, and the peak is then that level's.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from contest import OURS, Report, Timer, add_options, figures, in_process, table, time_in_turn
from machine import limits
from op_cases import Call, Maker
from torch import Tensor

from gpt_ext import ops

SHAPES = {  # (N, d, o)
    "seed QKV": (8192, 252, 756),
    "seed projection": (8192, 252, 252),
    "seed up": (8192, 252, 1008),
    "seed down": (8192, 1008, 252),
    "seed vocabulary": (8192, 252, 104),
    "GPT-2 124M QKV": (2048, 768, 2304),
    "GPT-2 124M projection": (2048, 768, 768),
    "GPT-2 124M up": (2048, 768, 3072),
    "GPT-2 124M down": (2048, 3072, 768),
    "GPT-2 124M vocabulary": (256, 768, 50257),
}
ORIENTATIONS = ("NT", "NN", "TN")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
COLUMNS = ["product", "N x d x o", "dtype", *ORIENTATIONS, *(f"eager {o}" for o in ORIENTATIONS)]


def timers(linear: Call, x: Tensor, w: Tensor, g: Tensor) -> dict[str, Timer]:
    """Of each orientation; the gradients' products alone, after a forward that is not timed."""

    def gradient(x: Tensor, w: Tensor, of: Tensor) -> Callable[[], Any]:
        return partial(torch.autograd.grad, linear(x, w), of, g, retain_graph=True)

    def forward() -> None:
        with torch.no_grad():
            linear(x, w)

    x_leaf, w_leaf = x.detach().requires_grad_(), w.detach().requires_grad_()
    runs = {"NT": forward, "NN": gradient(x_leaf, w, x_leaf), "TN": gradient(x, w_leaf, w_leaf)}
    return {orientation: in_process(run) for orientation, run in runs.items()}


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for dtype in options.dtypes:
        make = Maker("cpu", DTYPES[dtype])
        for product, (rows, d, o) in SHAPES.items():
            inputs = make.normal(rows, d), make.weight(o, d), make.normal(rows, o)
            timed = {OURS: timers(ops.linear, *inputs), "eager": timers(F.linear, *inputs)}
            for orientation in ORIENTATIONS:
                machine_limits = limits()
                contestants = {name: each[orientation] for name, each in timed.items()}
                samples = time_in_turn(contestants, options.rounds, options.budget)
                yield {
                    "product": product,
                    "shape": f"{rows}x{d}x{o}",
                    "dtype": dtype,
                    "orientation": orientation,
                    "flops": 2 * rows * d * o,
                    "peak": machine_limits and machine_limits[f"{dtype}_flops"],
                    "contestants": figures(samples),
                }


def rate(result: dict[str, Any], name: str) -> str:
    """GFLOP/s, and the share of the peak."""
    flops = result["flops"] / result["contestants"][name]["median_s"]
    share = f" ({flops / result['peak']:.2f})" if result["peak"] else ""
    return f"{flops * 1e-9:.0f}{share}"


def cells(results: list[dict[str, Any]]) -> list[str]:
    """Of the three orientations of one product."""
    first = [results[0][key] for key in ("product", "shape", "dtype")]
    return first + [rate(result, name) for name in (OURS, "eager") for result in results]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    add_options(parser, rounds=11, budget=5)
    options = parser.parse_args()
    torch.manual_seed(0)
    report = Report("bench_products", options, device="cpu")
    for result in measure(options):
        told = [result[key] for key in ("product", "dtype", "orientation")]
        report.add(result, [*told, rate(result, OURS), rate(result, "eager")])
    count = len(ORIENTATIONS)
    results = report.results
    rows = [cells(results[i : i + count]) for i in range(0, len(results), count)]
    report.finish(table(COLUMNS, rows))


if __name__ == "__main__":
    main()
