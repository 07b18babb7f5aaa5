"""Shows that training under bfloat16 autocast learns what it learns in float32.

    python benchmarks/bench_precision.py [--rounds N] [--json FILE] [--record]

A round trains the character model for 1,000 steps twice, in float32 and under autocast, from the
same weights on the same batches of Python's language reference, as pydoc has it. Noise is what
another round's weights and batches change: the deviation of float32's losses over the rounds.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace

import torch
from contest import Report, add_options, table
from models import CHARS, build
from torch import Tensor

from gpt_ext.demo import standard_library_text
from gpt_ext.tokenizer import CharTokenizer

STEPS, WINDOW, BATCH, LEARNING_RATE = 1000, 100, 12, 1e-3
COLUMNS = ["steps", "float32, nats", "noise", "bfloat16 less float32", "the farthest of a round"]


def losses(tokens: Tensor, vocab_size: int, seed: int, autocast: bool) -> list[float]:
    """Of each step, in nats a token."""
    torch.manual_seed(seed)
    model = build(replace(CHARS, vocab_size=vocab_size))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    time, found = CHARS.context_length, []
    for _ in range(STEPS):
        starts = torch.randint(len(tokens) - time, (BATCH, 1))
        batch = tokens[starts + torch.arange(time + 1)]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model.loss(batch[:, :-1], batch[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add_options(parser, rounds=4)
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error(f"--rounds is {options.rounds}, expected 2 or more: noise is between rounds")
    text = standard_library_text()
    tokenizer = CharTokenizer.from_text(text)
    tokens = tokenizer.encode(text)
    report = Report("bench_precision", options)
    runs = [
        [losses(tokens, len(tokenizer), seed, autocast) for autocast in (False, True)]
        for seed in range(options.rounds)
    ]
    rows = []
    for end in range(WINDOW, STEPS + 1, WINDOW):
        means = [[statistics.fmean(run[end - WINDOW : end]) for run in pair] for pair in runs]
        exact = [float32 for float32, _ in means]
        differences = [bfloat16 - float32 for float32, bfloat16 in means]
        result = {
            "steps": f"{end - WINDOW + 1} to {end}",
            "float32": statistics.fmean(exact),
            "noise": statistics.stdev(exact),
            "difference": statistics.fmean(differences),
            "farthest": max(differences, key=abs),
        }
        steps, float32, *rest = result.values()
        rows.append([str(steps), f"{float32:.3f}", *(f"{x:.4f}" for x in rest)])
        report.add(result, rows[-1])
    report.finish(table(COLUMNS, rows))


if __name__ == "__main__":
    main()
