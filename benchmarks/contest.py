"""What the benchmarks share: contestants timed in turn, their figures, and the record of them."""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import machine, machine_line

OURS = "gpt_ext"
RESULTS = Path(__file__).parent / "RESULTS.md"
SAMPLE_SECONDS = 0.05  # a sample repeats its call until it is about this long
WARM_UPS = 3

Run = Callable[[], Any]


def seconds(run: Run, repeats: int = 1, device: str = "cpu") -> float:
    """Seconds a call, over so many of them, the device's work included."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def time_in_turn(
    runs: dict[str, Run], rounds: int, *, budget: float = math.inf, device: str = "cpu"
) -> dict[str, list[float]]:
    """Seconds a call of every contestant, for every round; each round begins with another one.

    Rounds end early once they have taken `budget` seconds; one is always made.
    """
    repeats = {}
    for name, run in runs.items():
        start = time.perf_counter()
        for _ in range(WARM_UPS):  # torch.compile compiles here
            last = seconds(run, 1, device)
            if time.perf_counter() - start > budget / 10:
                break
        repeats[name] = max(1, round(SAMPLE_SECONDS / last))
    samples: dict[str, list[float]] = {name: [] for name in runs}
    start = time.perf_counter()
    for turn in range(rounds):
        names = list(runs)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            samples[name].append(seconds(runs[name], repeats[name], device))
        if time.perf_counter() - start > budget:
            break
    return samples


def spread(samples: list[float]) -> float:
    """The middle half of the samples over their median; 0 of a single one."""
    if len(samples) == 1:
        return 0
    low, middle, high = statistics.quantiles(samples, n=4)
    return (high - low) / middle


def figures(samples: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Median seconds, spread, and the median over the rounds of how many times our time it is."""
    return {
        name: {
            "median_s": statistics.median(times),
            "spread": spread(times),
            "times_ours": statistics.median(
                t / o for t, o in zip(times, samples[OURS], strict=True)
            ),
            "rounds": len(times),
        }
        for name, times in samples.items()
    }


def cell(figure: dict[str, float] | None, scale: float, digits: int = 0) -> str:
    """A peer's place in a table: its median time and how many times ours it is."""
    if figure is None:
        return "-"
    return f"{figure['median_s'] * scale:.{digits}f} ({figure['times_ours']:.2f}x)"


def our_cell(figure: dict[str, float], scale: float, digits: int = 0) -> str:
    return f"{figure['median_s'] * scale:.{digits}f} ±{figure['spread']:.0%}"


def row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def head(columns: list[str]) -> list[str]:
    return [row(columns), "|" + "---|" * len(columns)]


def first_line(error: BaseException) -> str:
    """Why a peer was left out, in one line."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def add_options(parser: argparse.ArgumentParser, rounds: int, budget: float) -> None:
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument(
        "--budget", type=float, default=budget, help="seconds a case, after which its rounds end"
    )
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--record", action="store_true", help="renew the table in RESULTS.md")


class Report:
    """The header now, every row as it is measured, and at the end the file and the record.

    `marker` names the table's place in RESULTS.md; `columns` are the table's, and `cells_of` a
    result's.
    """

    def __init__(
        self,
        marker: str,
        columns: list[str],
        cells_of: Callable[[dict[str, Any]], list[str]],
        options: argparse.Namespace,
        limits: str = "",
    ) -> None:
        self.marker, self.columns, self.cells_of, self.options = marker, columns, cells_of, options
        self.facts = machine()
        self.header = f"{machine_line(self.facts)}; {limits}{options.rounds} rounds."
        self.results: list[dict[str, Any]] = []
        print(self.header, *head(columns), sep="\n", flush=True)

    def add(self, result: dict[str, Any]) -> None:
        self.results.append(result)
        print(row(self.cells_of(result)), flush=True)

    def finish(self) -> None:
        if self.options.json:
            content = {"machine": self.facts, "results": self.results}
            self.options.json.write_text(json.dumps(content, indent=1) + "\n")
        if self.options.record:
            table = "\n".join([*head(self.columns), *(row(self.cells_of(r)) for r in self.results)])
            begin, end = f"<!-- {self.marker} -->", f"<!-- end of {self.marker} -->"
            before, rest = RESULTS.read_text().split(begin)
            after = rest.split(end)[1]
            RESULTS.write_text(f"{before}{begin}\n{self.header}\n\n{table}\n{end}{after}")
