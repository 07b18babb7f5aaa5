"""`gpt-ext inspect`: what a run's model is, has learned, and takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt_ext import checkpoint, costs
from gpt_ext.commands import Parser
from gpt_ext.model import GPT
from gpt_ext.optimizer import build_optimizer
from gpt_ext.options import TrainOptions


def parser() -> Parser:
    parser = Parser(description=run.__doc__)
    parser.add_argument("run", type=str, help="the folder of a run")
    return parser


def run(options: Any) -> int:
    """Tells a run's parameters, memory, FLOPs a token, and measures tokens a second on this CPU."""
    path = Path(options.run)
    config = checkpoint.read_config(path)
    model, _ = checkpoint.load_run(path)
    training = TrainOptions(**config["train"])
    records = checkpoint.read_lines(path / checkpoint.METRICS)
    losses = [r["validation_loss"] for r in records if r.get("validation_loss") is not None]
    shape, counts = model.config, costs.parameters(model)
    total = sum(counts.values())

    def objective(tokens: Tensor, targets: Tensor) -> Tensor:
        dtype = getattr(torch, training.precision)
        if dtype == torch.float16:  # which CPUs have no kernels for, and which is as wide
            dtype = torch.bfloat16
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return model.loss(tokens, targets)

    _tell("model", f"{shape.num_blocks} blocks of width {shape.model_dim}, {shape.num_heads} heads")
    _tell("context", f"{shape.context_length} tokens out of {shape.vocab_size}")
    _tell("trained", f"{max((r['step'] for r in records), default=0)} of {training.steps} steps")
    if losses:
        _tell("best validation loss", f"{min(losses):.4f}")
    _tell("parameters", f"{total:,}")
    for kind, count in counts.items():
        _tell(f"  {kind}", f"{count:,}")
    _tell("weights", _bytes(4 * total))
    copies = 4 + bool(training.ema)  # weights, gradients and two moments; their average
    kept = _bytes(costs.activation_bytes(model, objective))
    without = " without recompute" if training.recompute else ""
    _tell("memory to train", f"{_bytes(4 * copies * total)}, and {kept} a sequence{without}")
    flops = costs.forward_flops(shape)
    _tell("FLOPs a token", f"{flops:,} forward, {3 * flops:,} to train on it")
    batch = training.micro_batch_size or training.batch_size
    rate = costs.calls_a_second(_step(model, training, batch, objective))
    _tell("training here", f"{rate * batch * shape.context_length:,.0f} tokens/s")
    length = shape.context_length - 1
    prompt = torch.zeros(1, 1, dtype=torch.int64)
    rate = costs.calls_a_second(lambda: model.generate(prompt, length))
    _tell("generation here", f"{rate * length:,.0f} tokens/s within the context")
    return 0


def _step(model: GPT, options: TrainOptions, batch: int, objective: Any) -> Any:
    """A step of training on random tokens, which leaves the weights as they are."""
    optimizer = build_optimizer(model, options)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    shape = model.config
    tokens = torch.randint(shape.vocab_size, (batch, shape.context_length + 1))

    def step() -> None:
        optimizer.zero_grad()
        objective(tokens[:, :-1], tokens[:, 1:]).backward()
        optimizer.step()

    return step


def _tell(name: str, value: str) -> None:
    print(f"{name + ':':24}{value}", flush=True)


def _bytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"
