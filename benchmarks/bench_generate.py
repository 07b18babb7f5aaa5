"""Times text generation on a CPU against the packages that generate text.

    python benchmarks/bench_generate.py [--models NAME...] [--contestants NAME...] [--rounds N]
                                        [--budget S] [--json FILE] [--record]

The same random weights for everybody who can express them, the likeliest token at each step, each
contestant in a process of its own, all in turn. First their text is held against ours. Peers:
`pip install transformers ctranslate2 onnxruntime onnx gguf llama-cpp-python`; whoever is not there
is left out with a word. The bound is the memory's: the bytes that a token of batch 1 must read, at
the rate at which this machine, in the same run, reads a working set of that size.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import plots
import torch
from contest import OURS, Report, add_options, figures, table, time_in_turn
from generators import ENTRIES
from generators.process import Contestant, Tokens
from machine import limits
from models import GPT2, SEED

from gpt_ext import GPTConfig

REST_SECONDS = 0.2  # the threads of the one before may still spin
MODELS = {"seed": SEED, "GPT-2 124M": GPT2}
COLUMNS = ["model", "task", "contestant", "tokens/s", "times ours", "of the memory's", "text"]


@dataclass(frozen=True)
class Task:
    """`new` tokens after prompts of `prompt` tokens, in `batch` rows.

    Speed counts the new tokens, or, where there is only one, the prompt's.
    """

    model: str
    name: str
    batch: int
    prompt: int
    new: int

    @property
    def config(self) -> GPTConfig:
        return MODELS[self.model]

    @property
    def tokens(self) -> int:
        return self.batch * (self.prompt if self.new == 1 else self.new)

    @property
    def past_the_window(self) -> bool:
        return self.prompt + self.new > self.config.context_length + 1

    @property
    def reads_weights_alone(self) -> bool:
        """Whether reading all weights for every token is what takes time."""
        return self.batch == 1 and self.new > 1 and not self.past_the_window

    def prompts(self) -> Tokens:
        generator = torch.Generator().manual_seed(0)
        shape = (self.batch, self.prompt)
        tokens: Tokens = torch.randint(self.config.vocab_size, shape, generator=generator).tolist()
        return tokens


TASKS = [
    Task("seed", "decode", 1, 1, 127),
    Task("seed", "past the window", 1, 128, 32),
    Task("seed", "prefill 127", 1, 127, 1),
    Task("seed", "decode, batch 16", 16, 1, 127),
    Task("GPT-2 124M", "decode", 1, 1, 256),
    Task("GPT-2 124M", "prefill 512", 1, 512, 1),
    Task("GPT-2 124M", "decode, batch 16", 16, 1, 64),
]


def token_bytes(config: GPTConfig, weight_bytes: float, context: float) -> float:
    """What one token of batch 1 must read: every matrix, and `context` float32 keys and values."""
    dim, blocks = config.model_dim, config.num_blocks
    weights = blocks * 12 * dim**2 + config.vocab_size * dim
    return weight_bytes * weights + 4 * blocks * 2 * dim * context


def enter(names: list[str], config: GPTConfig, batch: int) -> dict[str, Contestant]:
    """Those who can take part."""
    entered = {}
    for name in names:
        try:
            entered[name] = Contestant(name, config, batch)
        except RuntimeError as error:
            print(f"{name} left out: {error}", flush=True)
    return entered


def agreeing(found: Tokens, expected: Tokens) -> int:
    """How many tokens of each row are as expected before any row differs."""
    columns = zip(zip(*found, strict=True), zip(*expected, strict=True), strict=True)
    same = [mine == theirs for mine, theirs in columns]
    return same.index(False) if False in same else len(same)


def run(task: Task, entered: dict[str, Contestant], options: Any) -> Iterator[dict[str, Any]]:
    """A result for each contestant that does the task."""
    prompts = task.prompts()
    texts = {}
    for name in list(entered):
        if task.past_the_window and not ENTRIES[name].slides:
            continue
        try:
            texts[name] = entered[name].generate(prompts, task.new)[1]
        except RuntimeError as error:
            print(f"{name} left out: {error}", flush=True)
            entered.pop(name).stop()

    def timer(name: str, repeats: int) -> float:
        time.sleep(REST_SECONDS)
        return entered[name].generate(prompts, task.new, repeats)[0]

    timers = {name: partial(timer, name) for name in texts}
    found = figures(time_in_turn(timers, options.rounds, options.budget))
    context = task.prompt + (task.new - 1) / 2
    bytes_of = {
        name: token_bytes(task.config, ENTRIES[name].weight_bytes, context) for name in texts
    }
    measured = (
        limits(*{int(size) for size in bytes_of.values()}) if task.reads_weights_alone else {}
    )
    for name, figure in found.items():
        size = int(bytes_of[name])
        yield {
            "model": task.model,
            "task": task.name,
            "contestant": name,
            "tokens_per_s": task.tokens / figure["median_s"],
            "token_bytes": size,
            "bound": measured["read"][size] / size if measured else None,
            "agreeing": agreeing(texts[name], texts[OURS]),
            "new": task.new,
            **figure,
        }


def cells(result: dict[str, Any]) -> list[str]:
    rate, bound, agrees = result["tokens_per_s"], result["bound"], result["agreeing"]
    return [
        *(result[key] for key in COLUMNS[:3]),
        f"{rate:.0f} ±{result['spread']:.0%}",
        f"{result['times_ours']:.2f}x",
        f"{rate / bound:.2f}" if bound else "-",
        "the same" if agrees == result["new"] else f"{agrees} tokens the same",
    ]


def plot(results: list[dict[str, Any]], name: str) -> None:
    """Tokens a second over the bytes that each must read, and the bound."""
    bound = [result for result in results if result["bound"]]
    title = "Generation, batch 1: what is read for a token, and how fast it comes"
    axes = plots.new_axes(title, "bytes a token must read, MB", "tokens/s")
    ends = sorted({(r["token_bytes"] / 1e6, r["bound"]) for r in bound})
    axes.plot(*zip(*ends, strict=True), "--", marker="", color=plots.INK, label="memory's bound")
    families: dict[str, list[dict[str, Any]]] = {}
    for result in bound:
        families.setdefault(result["contestant"].split()[0].rstrip(","), []).append(result)
    for family, members in families.items():
        sizes = [member["token_bytes"] / 1e6 for member in members]
        axes.plot(sizes, [m["tokens_per_s"] for m in members], linestyle="", label=family)
    axes.set(xscale="log", yscale="log")
    axes.legend()
    plots.save(axes, name)


def main() -> None:
    parser = argparse.ArgumentParser(description="Times text generation against its peers.")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--contestants", nargs="+", choices=list(ENTRIES), default=list(ENTRIES))
    add_options(parser, rounds=7, budget=30)
    options = parser.parse_args()

    names = list(dict.fromkeys([OURS, *options.contestants]))
    report = Report("bench_generate", options, device="cpu")
    for model in options.models:
        of_model = [task for task in TASKS if task.model == model]
        for batch in sorted({task.batch for task in of_model}):
            tasks = [task for task in of_model if task.batch == batch]
            entered = enter(names, MODELS[model], batch)
            try:
                for task in tasks:
                    for result in run(task, entered, options):
                        report.add(result, cells(result))
            finally:
                for each in entered.values():
                    each.stop()
    report.finish(table(COLUMNS, [cells(result) for result in report.results]))
    if options.record:
        plot(report.results, report.name.removeprefix("bench_").replace(" ", "_"))


if __name__ == "__main__":
    main()
