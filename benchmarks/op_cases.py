"""The ops at the shapes of the seed and of GPT-2 124M, ours and as plain PyTorch writes them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpt_ext import ops

ATTENTION_SHAPES = {  # (B, T, H, D)
    "seed": (64, 128, 6, 42),
    "GPT-2 124M": (4, 1024, 12, 64),
    "GPT-2 124M, long": (1, 4096, 12, 64),
    "wide heads": (1, 1024, 4, 128),
}
CUDA_ATTENTION_SHAPES = {"16k tokens": (16, 1024, 32, 64)}  # what fills a device
SDPA_BACKENDS = {  # what SDPA chooses from, on CUDA
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
}
MOST_SCORES = 2**24  # B H T T; beyond it, attention from its formula is no contestant
FFN_SHAPES = {  # (N, d, h), activation
    "seed": (8192, 252, 1008, "relu"),
    "GPT-2 124M": (1024, 768, 3072, "gelu_tanh"),
}
LINEAR_SHAPES = {  # (N, d, o), bias, and what stands around it: "norm" before or "residual" after
    "seed QKV": (8192, 252, 756, False, "norm"),
    "seed projection": (8192, 252, 252, True, "residual"),
    "GPT-2 124M QKV": (1024, 768, 2304, True, "norm"),
    "GPT-2 124M projection": (1024, 768, 768, True, "residual"),
}
CROSS_ENTROPY_SHAPES = {  # (N, d, V)
    "seed": (8192, 252, 104),
    "GPT-2 124M": (1024, 768, 50257),
}

EMBEDDING_SHAPES = {  # (B, T, V, d)
    "seed": (64, 128, 104, 252),
    "GPT-2 124M": (4, 64, 50257, 768),
}

Call = Callable[..., Tensor]


@dataclass
class Case:
    """One op at one shape, and those who compute it; every call takes the inputs.

    Ours is checked against `eager` on the inputs `checked`.
    """

    op: str
    shape: str
    inputs: tuple[Tensor, ...]
    calls: dict[str, Call]
    eager: Call
    checked: tuple[Tensor, ...]


class Maker:
    """Random tensors of one device and dtype."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype

    def normal(self, *shape: int, deviation: float = 1.0) -> Tensor:
        return (deviation * torch.randn(*shape, device=self.device)).to(self.dtype)

    def weight(self, outputs: int, inputs: int) -> Tensor:
        return self.normal(outputs, inputs, deviation=inputs**-0.5)


def case(op: str, shape: str, inputs: tuple[Tensor, ...], ours: Call, eager: Call) -> Case:
    calls = {"gpt_ext": ours, "eager": eager, "compile": torch.compile(eager, dynamic=False)}
    return Case(op, shape, inputs, calls, eager, inputs)


def eager_attention(qkv: Tensor) -> Tensor:
    """Attention as it is written from its formula: product, mask, softmax, product."""
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))  # (B, H, T, D)
    time_steps = q.shape[2]
    future = torch.ones(time_steps, time_steps, dtype=torch.bool, device=q.device).triu(1)
    scores = q @ k.transpose(2, 3) * q.shape[3] ** -0.5
    probabilities = scores.masked_fill(future, -math.inf).softmax(-1)
    return (probabilities @ v).transpose(1, 2).contiguous()


def sdpa(qkv: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).contiguous()


def sdpa_by(backend: SDPBackend) -> Call:
    def call(qkv: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return sdpa(qkv)

    return call


def our_attention(qkv: Tensor) -> Tensor:
    return ops.packed_causal_attention(qkv)


def attention_cases(make: Maker) -> Iterator[Case]:
    shapes = ATTENTION_SHAPES | (CUDA_ATTENTION_SHAPES if make.device == "cuda" else {})
    for name, (batch, time_steps, heads, dim) in shapes.items():
        qkv = make.normal(batch, time_steps, 3, heads, dim)
        shape = f"{name} {batch}x{time_steps}x{heads}x{dim}"
        theirs = {"SDPA": sdpa}
        if make.device == "cuda":
            theirs |= {name: sdpa_by(backend) for name, backend in SDPA_BACKENDS.items()}
        if batch * heads * time_steps**2 <= MOST_SCORES:
            found = case("attention", shape, (qkv,), our_attention, eager_attention)
            found.calls.update(theirs)
            yield found
        else:
            calls = {"gpt_ext": our_attention, **theirs}
            one_head = qkv[:1, ..., :1, :]
            yield Case("attention", shape, (qkv,), calls, eager_attention, (one_head,))


def ffn_cases(make: Maker) -> Iterator[Case]:
    for name, (rows, d, h, kind) in FFN_SHAPES.items():

        def eager(
            x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, kind: str = kind
        ) -> Tensor:
            z = F.linear(x, w1, b1)
            return F.linear(F.relu(z) if kind == "relu" else F.gelu(z, approximate="tanh"), w2, b2)

        def ours(*inputs: Tensor, kind: str = kind) -> Tensor:
            return ops.feed_forward(*inputs, activation=kind)

        weights = make.weight(h, d), make.normal(h), make.weight(d, h), make.normal(d)
        inputs = (make.normal(rows, d), *weights)
        yield case("FFN", f"{name} {rows}x{d}x{h} {kind}", inputs, ours, eager)


def eager_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias)


def eager_normed_linear(x: Tensor, w: Tensor, nw: Tensor, nb: Tensor, *b: Tensor) -> Tensor:
    return F.linear(eager_norm(x, nw, nb), w, *b)


def our_normed_linear(x: Tensor, w: Tensor, nw: Tensor, nb: Tensor, *b: Tensor) -> Tensor:
    return ops.linear(x, w, *b, norm=ops.Norm(nw, nb))


def eager_residual_linear(x: Tensor, w: Tensor, residual: Tensor, *b: Tensor) -> Tensor:
    return residual + F.linear(x, w, *b)


def our_residual_linear(x: Tensor, w: Tensor, residual: Tensor, *b: Tensor) -> Tensor:
    return ops.linear(x, w, *b, residual=residual)


def linear_cases(make: Maker) -> Iterator[Case]:
    for name, (rows, d, o, has_bias, around) in LINEAR_SHAPES.items():
        shape = f"{name} {rows}x{d}x{o}"
        x, w, bias = make.normal(rows, d), make.weight(o, d), (make.normal(o),) * has_bias
        if around == "norm":
            inputs = (x, w, make.normal(d), make.normal(d), *bias)
            yield case("linear", shape, inputs, our_normed_linear, eager_normed_linear)
        else:
            inputs = (x, w, make.normal(rows, o), *bias)
            yield case("linear", shape, inputs, our_residual_linear, eager_residual_linear)


def cross_entropy_cases(make: Maker) -> Iterator[Case]:
    for name, (rows, d, vocab_size) in CROSS_ENTROPY_SHAPES.items():
        targets = torch.randint(vocab_size, (rows,), device=make.device)

        def eager(
            x: Tensor, w: Tensor, b: Tensor, nw: Tensor, nb: Tensor, targets: Tensor = targets
        ) -> Tensor:
            logits = F.linear(eager_norm(x, nw, nb), w, b)
            statistics = torch.promote_types(logits.dtype, torch.float32)
            return F.cross_entropy(logits.to(statistics), targets)

        def ours(
            x: Tensor, w: Tensor, b: Tensor, nw: Tensor, nb: Tensor, targets: Tensor = targets
        ) -> Tensor:
            return ops.cross_entropy(x, w, b, targets, norm=ops.Norm(nw, nb))

        weights = make.weight(vocab_size, d), make.normal(vocab_size), make.normal(d)
        inputs = (make.normal(rows, d), *weights, make.normal(d))
        yield case("cross entropy", f"{name} {rows}x{d}x{vocab_size}", inputs, ours, eager)


def embedding_cases(make: Maker) -> Iterator[Case]:
    for name, (batch, time, vocab_size, d) in EMBEDDING_SHAPES.items():
        tokens = torch.randint(vocab_size, (batch, time), device=make.device)

        def eager(weight: Tensor, positions: Tensor, tokens: Tensor = tokens) -> Tensor:
            return F.embedding(tokens, weight) + positions

        def ours(weight: Tensor, positions: Tensor, tokens: Tensor = tokens) -> Tensor:
            return ops.embedding(tokens, weight, positions)

        inputs = make.normal(vocab_size, d), make.normal(time, d)
        shape = f"{name} {batch}x{time}x{vocab_size}x{d}"
        yield case("embedding", shape, inputs, ours, eager)


CASES: dict[str, Callable[[Maker], Iterator[Case]]] = {
    "attention": attention_cases,
    "ffn": ffn_cases,
    "linear": linear_cases,
    "cross_entropy": cross_entropy_cases,
    "embedding": embedding_cases,
}
