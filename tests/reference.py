"""What the ops are to compute, written from the definitions alone; float64 makes it exact.

Nothing here uses gpt_ext. Gradients come from torch's autograd over these few lines.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor


def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, factor: Tensor | None = None
) -> Tensor:
    """Causal attention of (B, T, H, D); factor (B, H, T, T) multiplies the probabilities."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    past = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    probabilities = torch.where(past, scores, -torch.inf).softmax(-1)
    if factor is not None:
        probabilities = probabilities * factor
    return (probabilities @ v).transpose(1, 2)


def feed_forward(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, activation: str
) -> Tensor:
    """act(x w1^T + b1) w2^T + b2 with the activations' textbook formulas."""
    z = x @ w1.T + b1
    if activation == "relu":
        hidden = z.clamp(min=0)
    elif activation == "gelu":
        hidden = z * 0.5 * torch.erfc(-z / 2**0.5)
    else:
        hidden = z / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3)))
    return hidden @ w2.T + b2


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dim."""
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight + bias


def linear(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    norm: tuple[Tensor, Tensor] | None = None,
    residual: Tensor | None = None,
    factor: Tensor | None = None,
) -> Tensor:
    """residual + (norm(x) w^T + b) factor, where factor stands for dropout."""
    z = (x if norm is None else layer_norm(x, *norm)) @ w.T
    z = z if b is None else z + b
    z = z if factor is None else z * factor
    return z if residual is None else residual + z


def cross_entropy(logits: Tensor, targets: Tensor, ignore_index: int = -100) -> Tensor:
    """Mean over the rows whose target counts of log sum_v exp(z_v) - z_target."""
    counted = targets != ignore_index
    z, targets = logits[counted], targets[counted]
    return (z.exp().sum(-1).log() - z.gather(-1, targets[:, None])[:, 0]).sum() / len(targets)


def with_gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], dout: Tensor
) -> list[Tensor]:
    """function(*inputs) and the gradients of its inputs for the gradient dout of its output."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def exact(function: Callable[..., Tensor], inputs: Sequence[Tensor], dout: Tensor) -> list[Tensor]:
    """The same in float64 on the CPU, whatever the inputs' dtype and device."""
    return with_gradients(function, [t.cpu().double() for t in inputs], dout.cpu().double())


def philox(key: tuple[int, int], counter: Sequence[int]) -> list[int]:
    """Philox4x32-10 (Salmon et al., 2011) of one counter, in Python's unbounded integers."""
    k0, k1 = key
    c0, c1, c2, c3 = counter
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = p1 >> 32 ^ c1 ^ k0, p1 % 2**32, p0 >> 32 ^ c3 ^ k1, p0 % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


def residual_keep_mask(seed: int, p: float, rows: int, columns: int) -> Tensor:
    """Dropout's mask (rows, columns): word j % 4 of counter (j / 4, i, 0, 1) against p 2^32."""
    key = seed % 2**32, (seed >> 32) % 2**32
    keep = np.empty((rows, columns), dtype=bool)
    for row, block in np.ndindex(rows, (columns + 3) // 4):
        words = philox(key, (block, row, 0, 1))[: columns - 4 * block]
        keep[row, 4 * block : 4 * block + 4] = [word >= int(p * 2**32) for word in words]
    return torch.from_numpy(keep)


def attention_keep_mask(seed: int, p: float, batch: int, heads: int, time: int) -> Tensor:
    """Dropout's mask (B, H, T, T): word j % 4 of counter (j / 4, i, b H + h, 0) against p 2^32."""
    key = seed % 2**32, (seed >> 32) % 2**32
    keep = np.empty((batch * heads, time, time), dtype=bool)
    for head, row, block in np.ndindex(batch * heads, time, (time + 3) // 4):
        words = philox(key, (block, row, head, 0))[: time - 4 * block]
        keep[head, row, 4 * block : 4 * block + 4] = [word >= int(p * 2**32) for word in words]
    return torch.from_numpy(keep).unflatten(0, (batch, heads))
