"""A decoder of random weights, packed for the engine, and in float64 by the definitions."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gpt_ext.ops import decode

EPS = 1e-5
ACTIVATIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


class Model:
    """Random weights in the order of `decode.pack`, and what a decoder makes of them."""

    def __init__(
        self, vocab: int = 37, context: int = 40, dim: int = 42, blocks: int = 2, heads: int = 3,
        activation: str = "relu",
    ) -> None:  # fmt: skip
        self.vocab, self.context, self.dim, self.blocks = vocab, context, dim, blocks
        self.heads, self.activation = heads, activation
        hidden = 4 * dim
        torch.manual_seed(1)

        def linear(outputs: int, inputs: int) -> list[Tensor]:
            return [torch.randn(outputs, inputs) * 1.5 / inputs**0.5, torch.randn(outputs) / 4]

        def norm() -> list[Tensor]:
            return [1 + torch.randn(dim) / 4, torch.randn(dim) / 4]

        self.weights = [torch.randn(vocab, dim), torch.randn(context, dim), *norm()]
        self.weights += linear(vocab, dim)
        for _ in range(blocks):
            self.weights += [*norm(), *linear(3 * dim, dim), *linear(dim, dim)]
            self.weights += [*norm(), *linear(hidden, dim), *linear(dim, hidden)]

    def packed(self, form: decode.WeightFormat = "float32") -> Tensor:
        return decode.pack(self.weights, self.heads, self.activation, form, EPS)

    def cache(
        self, sequences: int, form: decode.WeightFormat = "float32", positions: int | None = None
    ) -> decode.Cache:
        head_size = self.dim // self.heads
        return decode.Cache.empty(
            self.blocks, sequences, self.heads, positions or self.context, head_size, form
        )

    def logits(
        self, tokens: Tensor, dtype: torch.dtype = torch.float64, rounded: Any = None,
        rounded_rows: Any = None,
    ) -> Tensor:  # fmt: skip
        """(B, T, V) by the definitions; `rounded` is applied to each matrix that is multiplied,
        `rounded_rows` to what it is multiplied with.
        """
        w = [t.to(dtype) for t in self.weights]

        def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            if rounded is not None:
                weight = rounded(weight.float()).to(dtype)
            return (x if rounded_rows is None else rounded_rows(x)) @ weight.T + bias

        def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return F.layer_norm(x, (self.dim,), weight, bias, EPS)

        x = w[0][tokens] + w[1][: tokens.shape[1]]
        past = torch.ones(2 * tokens.shape[1:], dtype=torch.bool).tril()
        for i in range(self.blocks):
            b = w[6 + 12 * i : 18 + 12 * i]
            qkv = linear(norm(x, b[0], b[1]), b[2], b[3])
            q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            scores = q @ k.mT / math.sqrt(self.dim / self.heads)
            attended = scores.masked_fill(~past, -math.inf).softmax(-1) @ v
            x = x + linear(attended.transpose(1, 2).flatten(2), b[4], b[5])
            hidden = ACTIVATIONS[self.activation](linear(norm(x, b[6], b[7]), b[8], b[9]))
            x = x + linear(hidden, b[10], b[11])
        return linear(norm(x, w[2], w[3]), w[4], w[5])
