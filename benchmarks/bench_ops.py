"""Times gpt_ext.ops against PyTorch: eager, scaled_dot_product_attention and torch.compile.

    python benchmarks/bench_ops.py [--device cpu|cuda] [--rounds N] [--json FILE] [--record]

Each case is first checked: our error against float64 is held against eager PyTorch's. Then, round
after round, all contestants are timed in turn, so that a change of the machine's mood meets all of
them; the figures are medians over the rounds, the ratio is the median of each round's ratio.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from machine import machine, machine_line
from torch import Tensor

from gpt_ext import ops

RESULTS = Path(__file__).parent / "RESULTS.md"
SAMPLE_SECONDS = 0.05  # a sample repeats its call until it is about this long

ATTENTION_SHAPES = {  # (B, T, H, D)
    "seed": (64, 128, 6, 42),
    "GPT-2 124M": (1, 1024, 12, 64),
    "wide heads": (1, 1024, 4, 128),
}
FFN_SHAPES = {  # (N, d, h), activation
    "seed": (8192, 252, 1008, "relu"),
    "GPT-2 124M": (1024, 768, 3072, "gelu_tanh"),
}

Call = Callable[..., Tensor]


@dataclass
class Case:
    """One op at one shape, and those who compute it; every call takes the inputs."""

    op: str
    shape: str
    inputs: tuple[Tensor, ...]
    calls: dict[str, Call]


def eager_attention(qkv: Tensor) -> Tensor:
    """Attention as it is written from its formula: product, mask, softmax, product."""
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))  # (B, H, T, D)
    time_steps = q.shape[2]
    future = torch.ones(time_steps, time_steps, dtype=torch.bool, device=q.device).triu(1)
    scores = q @ k.transpose(2, 3) * q.shape[3] ** -0.5
    probabilities = scores.masked_fill(future, -math.inf).softmax(-1)
    return (probabilities @ v).transpose(1, 2).contiguous()


def sdpa(qkv: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).contiguous()


def our_attention(qkv: Tensor) -> Tensor:
    return ops.causal_attention(*qkv.unbind(2))


def attention_cases(device: str, dtype: torch.dtype) -> Iterator[Case]:
    for name, (batch, time_steps, heads, dim) in ATTENTION_SHAPES.items():
        qkv = torch.randn(batch, time_steps, 3, heads, dim, device=device, dtype=dtype)
        calls: dict[str, Call] = {
            "gpt_ext": our_attention,
            "eager": eager_attention,
            "SDPA": sdpa,
            "compile": torch.compile(eager_attention, dynamic=False),
        }
        yield Case("attention", f"{name} {batch}x{time_steps}x{heads}x{dim}", (qkv,), calls)


def ffn_cases(device: str, dtype: torch.dtype) -> Iterator[Case]:
    def make(*shape: int, deviation: float = 1.0) -> Tensor:
        return (deviation * torch.randn(*shape, device=device)).to(dtype)

    for name, (rows, d, h, activation) in FFN_SHAPES.items():
        w1, w2 = make(h, d, deviation=d**-0.5), make(d, h, deviation=h**-0.5)

        def eager(
            x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, kind: str = activation
        ) -> Tensor:
            z = F.linear(x, w1, b1)
            return F.linear(F.relu(z) if kind == "relu" else F.gelu(z, approximate="tanh"), w2, b2)

        def ours(*inputs: Tensor, kind: str = activation) -> Tensor:
            return ops.feed_forward(*inputs, activation=kind)

        calls: dict[str, Call] = {
            "gpt_ext": ours,
            "eager": eager,
            "compile": torch.compile(eager, dynamic=False),
        }
        inputs = (make(rows, d), w1, make(h), w2, make(d))
        yield Case("FFN", f"{name} {rows}x{d}x{h} {activation}", inputs, calls)


def results_of(call: Call, inputs: tuple[Tensor, ...], dout: Tensor) -> list[Tensor]:
    """The output and the inputs' gradients."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = call(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def check(case: Case) -> None:
    """Raises if our largest error against float64 is beyond twice eager's, plus a few roundings."""
    eager, ours = case.calls["eager"], case.calls["gpt_ext"]
    dout = torch.randn_like(eager(*case.inputs))
    exact = results_of(eager, tuple(x.double() for x in case.inputs), dout.double())
    theirs, mine = results_of(eager, case.inputs, dout), results_of(ours, case.inputs, dout)
    for i, (e, t, m) in enumerate(zip(exact, theirs, mine, strict=True)):
        floor = 4 * torch.finfo(m.dtype).eps * e.abs().max().item()
        bound = 2 * (t - e).abs().max().item() + floor
        error = (m - e).abs().max().item()
        if not error <= bound:
            name = "out" if i == 0 else f"gradient of input {i - 1}"
            sys.exit(f"{case.op} {case.shape} {m.dtype}: {name} is off by {error}, bound {bound}")


def runnable(case: Case) -> dict[str, Call]:
    """The calls, without a torch.compile that does not work on this machine."""
    calls = dict(case.calls)
    try:
        calls["compile"](*case.inputs)
    except Exception as error:  # whatever the compiler chain throws: a peer left out, with a word
        print(f"compile left out: {type(error).__name__}: {str(error).splitlines()[0]}")
        del calls["compile"]
    return calls


def directions(case: Case, call: Call) -> dict[str, Callable[[], Any]]:
    """What is timed: forward without autograd, and forward with backward."""
    leaves = [x.detach().requires_grad_() for x in case.inputs]
    with torch.no_grad():
        dout = torch.randn_like(call(*case.inputs))

    def forward() -> None:
        with torch.no_grad():
            call(*case.inputs)

    def both() -> None:
        torch.autograd.grad(call(*leaves), leaves, dout)

    return {"forward": forward, "forward+backward": both}


def seconds(run: Callable[[], Any], repeats: int, device: str) -> float:
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
    runs: dict[str, Callable[[], Any]], rounds: int, device: str
) -> dict[str, list[float]]:
    """Seconds a call of every contestant, for every round."""
    repeats = {}
    for name, run in runs.items():
        seconds(run, 3, device)  # warm up; torch.compile compiles here
        repeats[name] = max(1, round(SAMPLE_SECONDS / seconds(run, 1, device)))
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds):
        names = list(runs)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            samples[name].append(seconds(runs[name], repeats[name], device))
    return samples


def summary(
    case: Case, dtype: str, direction: str, samples: dict[str, list[float]]
) -> dict[str, Any]:
    ours = samples["gpt_ext"]
    contestants = {}
    for name, times in samples.items():
        low, middle, high = statistics.quantiles(times, n=4)
        contestants[name] = {
            "median_us": middle * 1e6,
            "spread": (high - low) / middle,
            "times_ours": statistics.median(t / o for t, o in zip(times, ours, strict=True)),
        }
    return {
        "op": case.op,
        "shape": case.shape,
        "dtype": dtype,
        "direction": direction,
        "contestants": contestants,
    }


def measure(device: str, dtypes: list[str], rounds: int) -> Iterator[dict[str, Any]]:
    for dtype in dtypes:
        for cases in (attention_cases, ffn_cases):
            for case in cases(device, getattr(torch, dtype)):
                torch.compiler.reset()  # it gives up on a function after a few shapes
                check(case)
                timed = {name: directions(case, call) for name, call in runnable(case).items()}
                for direction in ("forward", "forward+backward"):
                    runs = {name: each[direction] for name, each in timed.items()}
                    yield summary(case, dtype, direction, time_in_turn(runs, rounds, device))


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: our time, and beside each peer's its ratio to ours (above 1: ours takes less)."""
    lines = [
        "| op | shape | dtype | direction | gpt_ext, us | eager | SDPA | compile |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        cells = [result[key] for key in ("op", "shape", "dtype", "direction")]
        contestants = result["contestants"]
        cells.append("{median_us:.0f} ±{spread:.0%}".format(**contestants["gpt_ext"]))
        for peer in ("eager", "SDPA", "compile"):
            found = contestants.get(peer)
            cells.append("{median_us:.0f} ({times_ours:.2f}x)".format(**found) if found else "-")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def record(device: str, header: str, text: str) -> None:
    """Puts the table between RESULTS.md's markers for this device."""
    begin, end = f"<!-- bench_ops {device} -->", f"<!-- end of bench_ops {device} -->"
    before, rest = RESULTS.read_text().split(begin)
    after = rest.split(end)[1]
    RESULTS.write_text(f"{before}{begin}\n{header}\n\n{text}\n{end}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Times gpt_ext.ops against PyTorch.")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--record", action="store_true", help="renew the table in RESULTS.md")
    options = parser.parse_args()

    torch.manual_seed(0)
    facts = machine()
    header = f"{machine_line(facts)}; {options.rounds} rounds."
    print(header)
    results = []
    for result in measure(options.device, options.dtypes, options.rounds):
        results.append(result)
        print(table([result]).splitlines()[-1], flush=True)
    if options.json:
        options.json.write_text(json.dumps({"machine": facts, "results": results}, indent=1) + "\n")
    if options.record:
        record(options.device, header, table(results))


if __name__ == "__main__":
    main()
