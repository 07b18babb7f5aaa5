"""Shows how training on a CPU scales: with threads, sequence length, batch and model size.

    python benchmarks/bench_scaling.py [--parts NAME...] [--rounds N] [--budget S] [--json FILE]
                                       [--record]

Threads: the seed's training step. Length: attention's forward and backward and its peak memory,
for T of 128 to 8192. Batch: tokens a second of the character model's training step. Size: the share
of the measured peak that training steps of GPTs of growing width reach. All in float32, against
eager PyTorch with scaled_dot_product_attention.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import plots
import torch
from bench_train import Case, Contestant
from contest import OURS, Report, add_options, figures, in_process, table, time_in_turn
from machine import limits
from memory import peak_in_child
from models import CHARS, SEED, training_flops
from op_cases import Call, eager_attention, our_attention, sdpa

EAGER = "eager PyTorch"
LENGTHS = [128 * 2**i for i in range(7)]
HEADS, HEAD_DIM = 12, 64
MOST_FORMULA_LENGTH = 2048  # beyond it, attention from its formula takes gigabytes
BATCHES = [1, 2, 4, 8, 16, 32, 64]
WIDTHS = [64, 128, 256, 384, 512, 768]
COLUMNS = ["part", "at", "contestant", "ms", "memory, MiB"]
ATTENTION: dict[str, Call] = {OURS: our_attention, "SDPA": sdpa, "formula": eager_attention}

Result = dict[str, Any]


def results(part: str, at: int, found: dict[str, Any], **more: Any) -> Iterator[Result]:
    for name, figure in found.items():
        yield {"part": part, "at": at, "contestant": name, **figure, **more}


def steps(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """The figures of training steps, ours and eager PyTorch's."""
    data = case.tokens()
    ours, eager = Contestant(OURS, case, "float32"), Contestant("eager", case, "float32")
    timers = {
        OURS: in_process(partial(ours.step, *data)),
        EAGER: in_process(partial(eager.step, *data)),
    }
    return figures(time_in_turn(timers, options.rounds, options.budget))


def threads(options: argparse.Namespace) -> Iterator[Result]:
    most = torch.get_num_threads()
    for count in range(1, most + 1):
        torch.set_num_threads(count)
        yield from results("threads", count, steps(Case(SEED, 64, 128), options))
    torch.set_num_threads(most)


def prepared_attention(name: str, length: int, count: int) -> Callable[[], None]:
    """A forward and backward, ready to be taken; what a first call alone needs is there."""
    torch.set_num_threads(count)
    if length > 1:
        prepared_attention(name, 1, count)()
    qkv = torch.randn(1, length, 3, HEADS, HEAD_DIM, requires_grad=True)
    dout = torch.randn(1, length, HEADS, HEAD_DIM)

    def run() -> None:
        torch.autograd.grad(ATTENTION[name](qkv), qkv, dout)

    return run


def length(options: argparse.Namespace) -> Iterator[Result]:
    count = torch.get_num_threads()
    for at in LENGTHS:
        names = [name for name in ATTENTION if name != "formula" or at <= MOST_FORMULA_LENGTH]
        timers = {name: in_process(prepared_attention(name, at, count)) for name in names}
        found = figures(time_in_turn(timers, options.rounds, options.budget))
        for result in results("length", at, found):
            memory = peak_in_child(prepared_attention, result["contestant"], at, count)
            yield result | {"memory": memory}


def batch(options: argparse.Namespace) -> Iterator[Result]:
    for at in BATCHES:
        case = Case(CHARS, at, CHARS.context_length)
        found = steps(case, options)
        yield from results("batch", at, found, tokens=at * case.time)


def size(options: argparse.Namespace) -> Iterator[Result]:
    for at in WIDTHS:
        config = replace(CHARS, model_dim=at, num_heads=max(1, at // 64), context_length=128)
        case = Case(config, 16, 128)
        measured = limits()
        flops = training_flops(config, case.batch, case.time)
        peak = measured["float32_flops"] if measured else math.nan
        yield from results("size", at, steps(case, options), flops=flops, peak=peak)


PARTS = {"threads": threads, "length": length, "batch": batch, "size": size}


class Plot(NamedTuple):
    """A value of a part's results over what the part varies."""

    name: str
    part: str
    title: str
    x: str
    y: str
    value: Callable[[Result], float]
    log_x: bool = True
    log_y: bool = False


def milliseconds(result: Result) -> float:
    return result["median_s"] * 1e3


THREADS_TITLE = "Training step of the seed, 64 x 128"
LENGTH_TITLE = f"Attention, forward and backward, 1 x T x {HEADS} x {HEAD_DIM}"
BATCH_TITLE = "Training step of the character model, T = 64"
SIZE_TITLE = "Training step of 4 blocks, 16 x 128"
PLOTS = [
    Plot("threads", "threads", THREADS_TITLE, "threads", "ms", milliseconds, log_x=False),
    Plot("length_time", "length", LENGTH_TITLE, "T", "ms", milliseconds, log_y=True),
    Plot(
        "length_memory", "length", LENGTH_TITLE, "T", "peak memory, MiB",
        lambda result: result["memory"] / 2**20, log_y=True,
    ),
    Plot(
        "batch", "batch", BATCH_TITLE, "B", "tokens/s",
        lambda result: result["tokens"] / result["median_s"],
    ),
    Plot(
        "size", "size", SIZE_TITLE, "model_dim", "share of the measured peak",
        lambda result: result["flops"] / result["median_s"] / result["peak"],
    ),
]  # fmt: skip


def draw(plot: Plot, all_results: list[Result]) -> None:
    lines: dict[str, plots.Points] = {}
    for result in all_results:
        if result["part"] == plot.part:
            x, y = lines.setdefault(result["contestant"], ([], []))
            x.append(result["at"])
            y.append(plot.value(result))
    if lines:
        plots.plot_lines(
            plot.name, plot.title, plot.x, plot.y, lines, log_x=plot.log_x, log_y=plot.log_y
        )


def cells(result: Result) -> list[str]:
    memory = result.get("memory")
    return [
        *(str(result[key]) for key in COLUMNS[:3]),
        f"{result['median_s'] * 1e3:.1f} ±{result['spread']:.0%}",
        f"{memory / 2**20:.0f}" if memory is not None else "-",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Shows how training on a CPU scales.")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    add_options(parser, rounds=7, budget=10)
    options = parser.parse_args()

    report = Report("bench_scaling", options)
    for part in options.parts:
        for result in PARTS[part](options):
            report.add(result, cells(result))
    report.finish(table(COLUMNS, [cells(result) for result in report.results]))
    if options.record:
        for plot in PLOTS:
            draw(plot, report.results)


if __name__ == "__main__":
    main()
