"""The tables of docs/scaling.md: what many GPUs would take, by formulas. Nothing here is measured.

    python benchmarks/scaling_on_paper.py

N parameters, F forward FLOPs a token, b T tokens a GPU and step, n GPUs. Seconds of a step:

    compute   3 F b T / (USED PEAK)
    DDP       2 (n - 1) / n 4 N / B      a ring all-reduce of float32 gradients
    FSDP      3 (n - 1) / n 4 N / B      parameters gathered twice, gradients scattered once

B is what a GPU sends in a second, one way, by the slowest link of the ring that it is part of.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gpt_ext import GPT
from gpt_ext.costs import forward_flops

PEAK, USED = 989e12, 0.4  # an H100's dense bfloat16 FLOP/s by its data sheet; a share, assumed
MEMORY = 80e9


@dataclass(frozen=True)
class Cluster:
    name: str
    gpus: int
    bandwidth: float  # B, bytes/s


CLUSTERS = [
    Cluster("8, NVLink", 8, 450e9),
    Cluster("64, 8 x 400 Gb/s a node", 64, 8 * 50e9),  # a ring a network card, 8 rings at once
    Cluster("64, 100 Gb/s a node", 64, 12.5e9),
]
MODELS = {  # layers, width, heads, context, sequences a GPU
    "124M": (12, 768, 12, 1024, 16),
    "1.6B": (48, 1600, 25, 1024, 8),
    "6.7B": (32, 4096, 32, 2048, 2),
}


def main() -> None:
    print(
        "| model | GPUs | compute | DDP | FSDP | DDP, of compute | FSDP, of compute | break-even |"
    )
    print("|---|---|---|---|---|---|---|---|")
    sizes = {}
    for name, (layers, width, heads, length, sequences) in MODELS.items():
        with torch.device("meta"):
            model = GPT(50257, length, width, layers, heads)
        sizes[name] = count = sum(p.numel() for p in model.parameters())
        tokens = sequences * length
        compute = 3 * forward_flops(model.config) * tokens / (USED * PEAK)
        for cluster in CLUSTERS:
            shard = (cluster.gpus - 1) / cluster.gpus * 4 * count / cluster.bandwidth
            print(
                f"| {name} | {cluster.name} | {compute * 1e3:.0f} ms | {2 * shard * 1e3:.1f} ms "
                f"| {3 * shard * 1e3:.1f} ms | {2 * shard / compute:.0%} "
                f"| {3 * shard / compute:.0%} | {2 * shard / compute * tokens:,.0f} |"
            )
    print("\n| model | parameters | DDP, a GPU | FSDP, 8 GPUs | FSDP, 64 GPUs |")
    print("|---|---|---|---|---|")
    for name, count in sizes.items():
        states = [16 * count, 16 * count / 8, 16 * count / 64]
        cells = (f"{s / 1e9:.2f} GB" + (", too much" if s > MEMORY else "") for s in states)
        print(f"| {name} | {count:,} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
