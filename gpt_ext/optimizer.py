"""AdamW as a run uses it: which weights decay, the rate by step, clipped steps, the average."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gpt_ext.adamw import AdamW, fresh_state
from gpt_ext.distributed import whole
from gpt_ext.model import GPT
from gpt_ext.options import TrainOptions


def build_optimizer(model: GPT, options: TrainOptions) -> torch.optim.AdamW:
    """AdamW that decays the weights of linear layers alone.

    Ours on a CPU; PyTorch's fused one on a GPU, for sharded weights, and for a CUDA graph, for it
    asks nothing of the device.

    Its moments are there from the start, as zeros, for a checkpoint to be read into. With
    cuda_graph the learning rate lies in the device's memory, so that a captured step reads it anew.
    """
    device = model.token_embedding.weight.device
    linear = {module.weight for module in model.modules() if isinstance(module, nn.Linear)}
    groups: list[dict[str, Any]] = [
        {"params": [p for p in model.parameters() if p in linear]},
        {"params": [p for p in model.parameters() if p not in linear], "weight_decay": 0.0},
    ]
    betas, weight_decay = (options.beta1, options.beta2), options.weight_decay
    optimizer: torch.optim.AdamW
    whole_on_cpu = all(type(p) is nn.Parameter and p.is_cpu for p in model.parameters())
    if whole_on_cpu and not options.cuda_graph:
        optimizer = AdamW(groups, options.learning_rate, betas, weight_decay=weight_decay)
    else:
        rate = options.learning_rate
        optimizer = torch.optim.AdamW(
            groups,
            lr=torch.tensor(rate, device=device) if options.cuda_graph else rate,
            betas=betas,
            weight_decay=weight_decay,
            fused=True,
            capturable=options.cuda_graph,
        )
    for parameter in model.parameters():
        optimizer.state[parameter] = fresh_state(parameter)
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Of all groups, in place where it is a tensor."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def clipped_step(optimizer: torch.optim.AdamW, loss: Tensor, clip_norm: float) -> Tensor:
    """A step on gradients scaled down to a norm of clip_norm; () the norm that they had.

    Where that or the loss is not finite, weights and moments are left as they are. Nobody waits for
    a GPU: it is for the fused kernels to see, as from a GradScaler.
    """
    if isinstance(optimizer, AdamW):
        norm = torch.tensor(optimizer.gradient_norm())
        if (loss + norm).isfinite():
            optimizer.step(gradient_scale=min(1.0, clip_norm / (norm.item() + 1e-6)))
        return norm
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = whole(nn.utils.clip_grad_norm_(parameters, clip_norm))
    optimizer.found_inf = (~(loss + norm).isfinite()).float()  # type: ignore[attr-defined]
    optimizer.step()
    return norm


def learning_rate(step: int, options: TrainOptions) -> float:
    """Linear warmup to the peak, then half a cosine down to final_learning_rate."""
    peak, final, warmup = options.learning_rate, options.final_learning_rate, options.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, options.steps - warmup)
    return final + (peak - final) * (1 + math.cos(math.pi * done)) / 2


class Average:
    """An exponential moving average of a model's weights (Polyak and Juditsky, 1992)."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay = model, decay
        self.weights: dict[str, Tensor] = {
            name: parameter.detach().clone() for name, parameter in model.named_parameters()
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the weights after step number `step`; early ones have more to say."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, parameter in self.model.named_parameters():
            self.weights[name].mul_(decay).add_(parameter, alpha=1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model has the average for its weights meanwhile."""
        own = {name: parameter.clone() for name, parameter in self.model.named_parameters()}
        self._copy(self.weights)
        try:
            yield
        finally:
            self._copy(own)

    @torch.no_grad()
    def _copy(self, weights: dict[str, Tensor]) -> None:
        for name, parameter in self.model.named_parameters():
            parameter.copy_(weights[name])
