"""What the benchmarks share: contestants timed in turn, their figures, and the record of them."""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from machine import machine, machine_line

from gpt_ext.cuda_graph import WARM_UP, Replayed

OURS = "gpt_ext"
FOLDER = Path(__file__).parent
RESULTS = FOLDER / "RESULTS.md"
SAMPLE_SECONDS = 0.05  # a sample repeats its call until it is about this long
WARM_UPS = 3

Timer = Callable[[int], float]  # seconds a call, over so many calls


def in_process(run: Callable[[], Any], device: str = "cpu") -> Timer:
    """Times calls in this process, the device's work included."""

    def seconds(repeats: int) -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        if device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / repeats

    return seconds


def in_graph(run: Callable[[], Any], calls: int = 10) -> Timer:
    """Times what the device does of a call: so many are captured in a CUDA graph, and replayed.

    Without it, what a call takes is often what Python and PyTorch take to launch its kernels.
    """

    def all_calls() -> tuple[()]:
        for _ in range(calls):
            run()
        return ()

    replayed = Replayed(all_calls, torch.device("cuda"))
    for _ in range(WARM_UP + 1):
        replayed()
    seconds = in_process(replayed, "cuda")
    return lambda repeats: seconds(math.ceil(repeats / calls)) / calls


def time_in_turn(
    timers: Mapping[str, Timer], rounds: int, budget: float = math.inf
) -> dict[str, list[float]]:
    """Seconds a call of every contestant, for every round; each round begins with another one.

    Rounds end early once they have taken `budget` seconds; one is always made.
    """
    repeats = {}
    for name, seconds in timers.items():
        start = time.perf_counter()
        for _ in range(WARM_UPS):  # torch.compile compiles here
            last = seconds(1)
            if time.perf_counter() - start > budget / 10:
                break
        repeats[name] = max(1, round(SAMPLE_SECONDS / last))
    samples: dict[str, list[float]] = {name: [] for name in timers}
    start = time.perf_counter()
    for turn in range(rounds):
        names = list(timers)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            samples[name].append(timers[name](repeats[name]))
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


def table(columns: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    return "\n".join([row(columns), "|" + "---|" * len(columns), *map(row, rows)])


def first_line(error: BaseException) -> str:
    """Why a peer was left out, in one line."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def add_options(parser: argparse.ArgumentParser, rounds: int, budget: float | None = None) -> None:
    """`--budget` is for programs that have one."""
    parser.add_argument("--rounds", type=int, default=rounds)
    if budget is not None:
        parser.add_argument(
            "--budget", type=float, default=budget, help="seconds a case, after which rounds end"
        )
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument(
        "--record", action="store_true", help="renew RESULTS.md, results/ and plots/"
    )


class Report:
    """The header, every result as it comes, which the file has at once, and at the end the record.

    `name` is that of the program, and of the table's place in RESULTS.md; one that has a table for
    each kind of processor gives the `device` it measures, whose kind is added to the name.
    """

    def __init__(
        self, name: str, options: argparse.Namespace, measured: str = "", device: str = ""
    ) -> None:
        self.facts = machine()
        kind = self.facts["simd_level"] if device == "cpu" else device
        self.name, self.options = f"{name} {kind}".strip(), options
        self.header = f"{machine_line(self.facts)}; {measured}up to {options.rounds} rounds."
        self.results: list[dict[str, Any]] = []
        print(self.header, flush=True)

    def add(self, result: dict[str, Any], cells: list[str]) -> None:
        self.results.append(result)
        if self.options.json:
            self.write(self.options.json)
        print(row(cells), flush=True)

    def write(self, file: Path) -> None:
        file.parent.mkdir(exist_ok=True)
        content = {"machine": self.facts, "results": self.results}
        file.write_text(json.dumps(content, indent=1) + "\n")

    def finish(self, text: str) -> None:
        """Makes the record, if it is asked for; `text` is what stands in RESULTS.md."""
        if not self.options.record:
            return
        self.write(FOLDER / "results" / f"{self.name.replace(' ', '_')}.json")
        begin, end = f"<!-- {self.name} -->", f"<!-- end of {self.name} -->"
        if begin not in RESULTS.read_text():
            sys.exit(f"{RESULTS} has no place for this table: expected the lines {begin} and {end}")
        before, rest = RESULTS.read_text().split(begin)
        after = rest.split(end)[1]
        RESULTS.write_text(f"{before}{begin}\n{self.header}\n\n{text}\n{end}{after}")
