"""Times the whole training step against PyTorch: eager with its fused attention, torch.compile.

    python benchmarks/bench_train.py [--device cuda] [--models NAME...] [--dtypes float32 bfloat16]
                                     [--rounds N] [--budget S] [--no-compile] [--no-memory]
                                     [--json FILE] [--record]

A step is zero_grad, forward, loss, backward and AdamW, on random tokens; bfloat16 is autocast over
float32 weights, for everybody. AdamW is our own in our steps on a CPU, else PyTorch's fused one.
First the losses and gradients of all are held against eager float32; then all take steps in turn.
Peak memory is that of steps in a process of its own, above what the process held before, with model
and optimizer built; of CPUs alone. On CUDA ours and eager also take part with the step in a CUDA
graph.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from contest import (
    OURS,
    Report,
    add_options,
    cell,
    figures,
    first_line,
    in_process,
    our_cell,
    table,
    time_in_turn,
)
from machine import limits
from memory import peak_in_child
from models import CHARS, GPT2, SEED, build, torch_twin, training_flops
from torch import Tensor, nn

from gpt_ext import AdamW, GPTConfig
from gpt_ext.cuda_graph import Replayed

GRAPH = " in a graph"


def peers(device: str) -> tuple[str, ...]:
    graphs = (OURS + GRAPH, "eager" + GRAPH) if device == "cuda" else ()
    return ("eager", "compile", *graphs)


def columns(device: str) -> list[str]:
    first = ["model", "B x T", "dtype", "gpt_ext, ms", *peers(device)]
    return [*first, "of peak", "memory, MiB", "of eager's"]


TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}  # of loss and gradient norm, relative
PROBE_TOKENS = 16


@dataclass(frozen=True)
class Case:
    config: GPTConfig
    batch: int
    time: int

    def tokens(self, device: str = "cpu") -> tuple[Tensor, Tensor]:
        """Inputs and targets, each (B, T)."""
        generator = torch.Generator().manual_seed(0)
        shape = (self.batch, self.time + 1)
        tokens = torch.randint(self.config.vocab_size, shape, generator=generator)
        inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        return inputs.to(device), targets.to(device)


CASES = {
    "seed": [Case(SEED, 64, 128)],
    "char CPU": [Case(CHARS, 12, 64)],
    "GPT-2 124M": [Case(GPT2, 4, 64), Case(GPT2, 4, 512)],
}


class Contestant:
    """A model with its optimizer, which takes steps in one dtype."""

    def __init__(self, name: str, case: Case, dtype: str, device: str = "cpu") -> None:
        torch.manual_seed(0)  # the same weights for everybody
        ours = build(case.config).to(device)
        self.name, self.dtype, self.device = name, getattr(torch, dtype), device
        self.model: Any = ours if name.removesuffix(GRAPH) == OURS else torch_twin(ours)
        self.loss: Callable[..., Tensor] = self.model.loss
        if name == "compile":
            self.loss = torch.compile(self.loss, dynamic=False)
        in_graph = name.endswith(GRAPH)
        parameters = self.model.parameters()
        self.optimizer: torch.optim.AdamW
        if name == OURS and device == "cpu":
            self.optimizer = AdamW(parameters, lr=1e-4)
        else:
            self.optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True, capturable=in_graph)
        self.step: Callable[..., tuple[Tensor, ...]] = self.take_step
        if in_graph:
            self.step = Replayed(self.take_step, torch.device(device))

    def gradients(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """The loss; its gradients are in the parameters."""
        self.optimizer.zero_grad()
        with torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32):
            loss = self.loss(tokens, targets)
        loss.backward()
        return loss

    def take_step(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor]:
        loss = self.gradients(tokens, targets)
        self.optimizer.step()
        return (loss,)


def loss_and_norm(contestant: Contestant, tokens: Tensor, targets: Tensor) -> tuple[float, float]:
    """The loss without dropout, and the norm of its gradient."""
    contestant.model.eval()
    loss = contestant.gradients(tokens, targets).item()
    norm = nn.utils.get_total_norm([p.grad for p in contestant.model.parameters()]).item()
    contestant.model.train()
    return loss, norm


def expect_agreement(
    name: str, found: tuple[float, float], expected: tuple[float, float], tolerance: float
) -> None:
    for what, value, reference in zip(("loss", "gradient norm"), found, expected, strict=True):
        if not abs(value - reference) <= tolerance * abs(reference):
            sys.exit(f"{name}: {what} is {value}, eager float32 has {reference}")


def too_slow(contestant: Contestant, case: Case, budget: float) -> bool:
    """Whether a step will take longer than the budget, by one on few tokens."""
    few = [tokens[:1, :PROBE_TOKENS] for tokens in case.tokens(contestant.device)]
    contestant.gradients(*few)
    start = time.perf_counter()
    contestant.gradients(*few).item()
    seconds = (time.perf_counter() - start) * case.batch * case.time / few[0].numel()
    # Few tokens make worse use of the machine, by less than this factor.
    if slow := seconds > 4 * budget:
        print(f"{contestant.name} left out: a step takes about {seconds:.0f} s")
    return slow


def contestants(case: Case, dtype: str, options: argparse.Namespace) -> dict[str, Contestant]:
    """Those who take part, checked."""
    device = options.device
    data = case.tokens(device)
    expected = loss_and_norm(Contestant("eager", case, "float32", device), *data)
    entered = {}
    for name in (OURS, *peers(device)):
        if name == "compile" and (options.no_compile or "eager" not in entered):
            continue
        contestant = Contestant(name, case, dtype, device)
        if name == "eager" and too_slow(contestant, case, options.budget):
            continue
        try:
            found = loss_and_norm(contestant, *data)
        except Exception as error:  # whatever the compiler chain throws: a peer left out
            if name == OURS:
                raise
            print(f"{name} left out: {first_line(error)}")
            continue
        expect_agreement(name, found, expected, TOLERANCE[dtype])
        entered[name] = contestant
    return entered


def prepared_steps(name: str, case: Case, dtype: str, threads: int) -> Callable[[], None]:
    """Two steps, ready to be taken: the optimizer's state is there, gradients are not."""
    torch.set_num_threads(threads)
    contestant, data = Contestant(name, case, dtype), case.tokens()
    contestant.step(*(tokens[:1, :1] for tokens in data))
    contestant.optimizer.zero_grad()

    def steps() -> None:
        contestant.step(*data)
        contestant.step(*data)

    return steps


def measure(case: Case, dtype: str, options: argparse.Namespace) -> dict[str, Any]:
    torch.compiler.reset()
    gc.collect()  # contestants refer to themselves: gigabytes of GPT-2's would pile up
    data = case.tokens(options.device)
    entered = contestants(case, dtype, options)
    on_cpu = options.device == "cpu"
    machine_limits = limits() if on_cpu else None
    timers = {
        name: in_process(partial(each.step, *data), options.device)
        for name, each in entered.items()
    }
    found = figures(time_in_turn(timers, options.rounds, options.budget))
    flops = training_flops(case.config, case.batch, case.time)
    memory = {}
    if on_cpu and not options.no_memory:
        for name in entered.keys() & {OURS, "eager"}:
            memory[name] = peak_in_child(prepared_steps, name, case, dtype, torch.get_num_threads())
    return {
        "shape": f"{case.batch} x {case.time}",
        "dtype": dtype,
        "flops": flops,
        "peak": machine_limits and machine_limits[f"{dtype}_flops"],
        "memory": memory,
        "contestants": found,
    }


def cells(result: dict[str, Any], device: str) -> list[str]:
    found, peak, memory = result["contestants"], result["peak"], result["memory"]
    of_peak = result["flops"] / found[OURS]["median_s"] / peak if peak else None
    return [
        *(result[key] for key in ("model", "shape", "dtype")),
        our_cell(found[OURS], 1e3, 1),
        *(cell(found.get(peer), 1e3, 1) for peer in peers(device)),
        f"{of_peak:.2f}" if of_peak else "-",
        f"{memory[OURS] / 2**20:.0f}" if OURS in memory else "-",
        f"{memory[OURS] / memory['eager']:.2f}" if "eager" in memory else "-",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Times the training step against PyTorch.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--models", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--dtypes", nargs="+", choices=list(TOLERANCE), default=list(TOLERANCE))
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile")
    parser.add_argument("--no-memory", action="store_true", help="without peak memory")
    add_options(parser, rounds=11, budget=60)
    options = parser.parse_args()

    measured = limits() if options.device == "cpu" else None
    peak = f"{measured['float32_flops'] * 1e-9:.0f} GFLOP/s float32 measured; " if measured else ""
    if not peak and options.device == "cpu":
        print("no native build (make bench makes it): fractions of the peak are left out")
    report = Report("bench_train", options, peak, options.device)
    for name in options.models:
        for case in CASES[name]:
            for dtype in options.dtypes:
                result = {"model": name} | measure(case, dtype, options)
                report.add(result, cells(result, options.device))
    rows = [cells(result, options.device) for result in report.results]
    report.finish(table(columns(options.device), rows))


if __name__ == "__main__":
    main()
