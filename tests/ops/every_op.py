"""The ops in a table, for what is asked of each of them alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import reference
import torch
from torch import Tensor

from gpt_ext.ops import (
    Norm,
    causal_attention,
    cross_entropy,
    feed_forward,
    linear,
    packed_causal_attention,
)


@dataclasses.dataclass
class Op:
    """An op, the shapes of its inputs (the first one's first dim is a batch) and its reference."""

    call: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    shapes: list[tuple[int, ...]]
    raw_forward: str
    raw_backward: str
    autocast_dtype: torch.dtype = torch.bfloat16  # of the result

    def inputs(self, device: str, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        return [torch.randn(s, device=device, dtype=dtype, requires_grad=True) for s in self.shapes]


def gelu_network(*inputs: Tensor) -> Tensor:
    return feed_forward(*inputs, activation="gelu")


def gelu_reference(*inputs: Tensor) -> Tensor:
    return reference.feed_forward(*inputs, activation="gelu")


def block_linear(x: Tensor, w: Tensor, b: Tensor, *rest: Tensor) -> Tensor:
    norm_weight, norm_bias, residual = rest
    return linear(x, w, b, norm=Norm(norm_weight, norm_bias), residual=residual)


def linear_reference(x: Tensor, w: Tensor, b: Tensor, *rest: Tensor) -> Tensor:
    *norm, residual = rest
    return reference.linear(x, w, b, norm, residual)


def sublayer(x: Tensor, *rest: Tensor) -> Tensor:
    *weights, norm_weight, norm_bias = rest
    return feed_forward(x, *weights, activation="gelu", norm=Norm(norm_weight, norm_bias))


def sublayer_reference(x: Tensor, *rest: Tensor) -> Tensor:
    *weights, norm_weight, norm_bias = rest
    return x + gelu_reference(reference.layer_norm(x, norm_weight, norm_bias), *weights)


def targets_for(x: Tensor) -> Tensor:
    """Some target for each row."""
    rows = x.shape[:-1]
    return (torch.arange(rows.numel(), device=x.device) % 3).view(rows)


def loss(x: Tensor, w: Tensor, b: Tensor, *norm: Tensor) -> Tensor:
    """Times x, to be shaped like the other ops' results."""
    return x * cross_entropy(x, w, b, targets_for(x), norm=Norm(*norm))


def loss_reference(x: Tensor, w: Tensor, b: Tensor, *norm: Tensor) -> Tensor:
    logits = reference.linear(x, w, b, norm).flatten(0, -2)
    return x * reference.cross_entropy(logits, targets_for(x).flatten())


def packed_reference(qkv: Tensor) -> Tensor:
    return reference.attention(*qkv.unbind(2))


NETWORK = [(2, 5, 4), (6, 4), (6,), (4, 6), (4,)]
OPS = {
    "attention": Op(
        causal_attention,
        reference.attention,
        [(2, 5, 2, 4)] * 3,
        "attention_forward",
        "attention_backward",
    ),
    "packed": Op(
        packed_causal_attention,
        packed_reference,
        [(2, 5, 3, 2, 4)],
        "attention_forward",
        "attention_backward",
    ),
    "linear": Op(
        block_linear,
        linear_reference,
        [(2, 5, 4), (6, 4), (6,), (4,), (4,), (2, 5, 6)],
        "linear_forward",
        "linear_backward",
        torch.float32,
    ),
    "ffn": Op(gelu_network, gelu_reference, NETWORK, "ffn_forward", "ffn_backward"),
    "sublayer": Op(
        sublayer,
        sublayer_reference,
        [*NETWORK, (4,), (4,)],
        "ffn_forward",
        "ffn_backward",
        torch.float32,
    ),
    "cross_entropy": Op(
        loss,
        loss_reference,
        [(2, 5, 4), (6, 4), (6,), (4,), (4,)],
        "cross_entropy_forward",
        "linear_backward",
        torch.float32,
    ),
}


def gradients(out: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """Of the sum of squares of out."""
    return list(torch.autograd.grad(out.square().sum(), inputs))


def assert_close(ours: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other)


class Block(torch.nn.Module):
    """A pre-norm block, (B, T, 8) -> (B, T, 8)."""

    def __init__(self, dropout_p: float = 0.0) -> None:
        super().__init__()
        self.qkv, self.projection = torch.nn.Linear(8, 24), torch.nn.Linear(8, 8)
        self.first, self.second = torch.nn.Linear(8, 12), torch.nn.Linear(12, 8)
        self.norms = torch.nn.ModuleList(torch.nn.LayerNorm(8) for _ in range(2))
        self.dropout_p = dropout_p

    def forward(self, x: Tensor) -> Tensor:
        p, qkv, projection, first, second = (
            self.dropout_p, self.qkv, self.projection, self.first, self.second
        )  # fmt: skip
        norms = [Norm(norm.weight, norm.bias, norm.eps) for norm in self.norms]
        packed = linear(x, qkv.weight, qkv.bias, norm=norms[0]).view(*x.shape[:2], 3, 2, 4)
        heads = packed_causal_attention(packed, dropout_p=p).flatten(2)
        x = linear(heads, projection.weight, projection.bias, residual=x, dropout_p=p)
        weights = first.weight, first.bias, second.weight, second.bias
        return feed_forward(x, *weights, norm=norms[1], dropout_p=p)


def parameter_gradients(model: torch.nn.Module, x: Tensor) -> list[Tensor]:
    return gradients(model(x), list(model.parameters()))
