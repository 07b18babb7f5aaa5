"""What AdamW does to all parameters of a model at once, on CPUs: csrc/ops/optimizer.h.

PyTorch's own optimizer, fused or not, takes the parameters one after the other there, each by all
threads; what a small model's step takes is then the beginning and end of each.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def norm(gradients: Sequence[Tensor]) -> float:
    """The 2-norm of all elements of the tensors, which are of one dtype and on a CPU.

    A few squares are summed in the accumulation type, their sums in float64, in order.

    Raises:
        RuntimeError: tensors differ in dtype, or are not contiguous.
        NotImplementedError: tensors are not on a CPU.
    """
    return torch.ops.gpt_ext.optimizer_norm(gradients)


def adamw_(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    averages: Sequence[Tensor],
    squares: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    learning_rate: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    gradient_scale: float = 1.0,
) -> None:
    """A step of AdamW (Loshchilov and Hutter, 2019) in place, on CPUs; nothing is done on an error.

    Args:
        parameters: contiguous, all float32, all float64 or all bfloat16.
        gradients: one of a parameter's shape and dtype for each; read as gradient_scale times that.
        averages: likewise, moving averages of the gradients; zeros before the first step.
        squares: likewise, of their squares.
        steps: () float32 for each, the number of steps taken so far, which is counted up.

    Raises:
        RuntimeError: a tensor is of a wrong dtype, shape or device, or not contiguous.
    """
    torch.ops.gpt_ext.optimizer_adamw(
        parameters, gradients, averages, squares, steps,
        learning_rate, *betas, eps, weight_decay, gradient_scale,
    )  # fmt: skip
    torch.autograd.graph.increment_version([*parameters, *averages, *squares, *steps])
