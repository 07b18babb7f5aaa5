"""Times `gpt-ext serve` against its own engine.

    python benchmarks/bench_serve.py [--clients N...] [--rounds N] [--budget S] [--json FILE]
                                     [--record]

The seed's model with random weights. Clients in a process of their own ask for one streamed
completion after the other; the engine alone writes as many texts at once, of as many tokens, with
no HTTP: `GPT.generate` with a generator a row. The two are timed in turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from contest import Report, add_options, spread, table
from load import PROMPT
from models import SEED, build

from gpt_ext import GPT
from gpt_ext.tokenizer import CharTokenizer

TOKENS = 112  # of an answer: with the prompt within the context
SECONDS = 3.0  # of load a sample
COLUMNS = [
    "clients", "engine alone, tokens/s", "served, tokens/s", "of the engine",
    "latency p50 / p99, ms", "first token p50 / p99, ms",
]  # fmt: skip


@contextmanager
def server(folder: str, slots: int) -> Iterator[int]:
    """The port of `gpt-ext serve`."""
    command = [sys.executable, "-m", "gpt_ext", "serve", folder, "--port", "0"]
    process = subprocess.Popen([*command, "--slots", str(slots)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield int(process.stdout.readline().rsplit(":", 1)[1])
    finally:
        process.terminate()
        process.wait()


def load(port: int, clients: int, seconds: float = SECONDS) -> dict[str, Any]:
    """What benchmarks/load.py measures."""
    program = str(Path(__file__).parent / "load.py")
    command = [sys.executable, program, *map(str, (port, clients, seconds, TOKENS))]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    found: dict[str, Any] = json.loads(output)
    return found


def engine_rate(model: GPT, batch: int) -> float:
    """Tokens a second of the engine alone, of a second or more."""
    prompts = [torch.tensor(PROMPT)] * batch
    start, texts = time.perf_counter(), 0
    while time.perf_counter() - start < 1:
        generators = [torch.Generator().manual_seed(i) for i in range(batch)]
        model.generate(prompts, TOKENS, generator=generators)
        texts += batch
    return texts * TOKENS / (time.perf_counter() - start)


def percentiles(seconds: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return {"p50_s": cuts[49], "p99_s": cuts[98]}


def measure(model: GPT, port: int, clients: int, options: Any) -> dict[str, Any]:
    """Both in turn, until rounds or budget are through."""
    engine_rate(model, clients), load(port, clients, 1)  # warm up
    alone, served = [], []
    latencies: list[float] = []
    first_tokens: list[float] = []
    start = time.perf_counter()
    for _ in range(options.rounds):
        alone.append(engine_rate(model, clients))
        found = load(port, clients)
        served.append(found["tokens"] / found["seconds"])
        latencies += found["latencies"]
        first_tokens += found["first_tokens"]
        if time.perf_counter() - start > options.budget:
            break
    return {
        "clients": clients,
        "engine_tokens_per_s": statistics.median(alone),
        "served_tokens_per_s": statistics.median(served),
        "spread": spread(served),
        "of_the_engine": statistics.median(s / a for s, a in zip(served, alone, strict=True)),
        "latency": percentiles(latencies),
        "first_token": percentiles(first_tokens),
        "rounds": len(served),
    }


def cells(result: dict[str, Any]) -> list[str]:
    def times(name: str) -> str:
        return f"{result[name]['p50_s'] * 1e3:.0f} / {result[name]['p99_s'] * 1e3:.0f}"

    return [
        str(result["clients"]),
        f"{result['engine_tokens_per_s']:.0f}",
        f"{result['served_tokens_per_s']:.0f} ±{result['spread']:.0%}",
        f"{result['of_the_engine']:.2f}",
        times("latency"),
        times("first_token"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Times `gpt-ext serve` against its engine.")
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 4, 16, 32, 64])
    add_options(parser, rounds=5, budget=30)
    options = parser.parse_args()

    report = Report("bench_serve", options)
    model = build(SEED).eval()
    with tempfile.TemporaryDirectory() as folder:
        characters = "".join(map(chr, range(32, 32 + SEED.vocab_size)))
        model.save_pretrained(folder, CharTokenizer(characters))
        with server(folder, max(options.clients)) as port:
            for clients in options.clients:
                result = measure(model, port, clients, options)
                report.add(result, cells(result))
    report.finish(table(COLUMNS, [cells(result) for result in report.results]))


if __name__ == "__main__":
    main()
