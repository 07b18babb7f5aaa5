"""Token and position embeddings, added: fake kernels, Function, public call.

The kernels are csrc/cpu/embedding_*.cpp and csrc/cuda/embedding_*.cu, the raw ops
torch.ops.gpt_ext.embedding_forward and embedding_backward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt_ext.ops import _functional

_FORWARD = torch.ops.gpt_ext.embedding_forward.default
_BACKWARD = torch.ops.gpt_ext.embedding_backward.default


@torch.library.register_fake("gpt_ext::embedding_forward")
def _(tokens: Tensor, weight: Tensor, positions: Tensor) -> Tensor:
    return weight.new_empty((*tokens.shape, weight.shape[1]))


@torch.library.register_fake("gpt_ext::embedding_backward")
def _(dout: Tensor, tokens: Tensor, vocabulary: int, wanted: list[bool]) -> tuple[Tensor, Tensor]:
    dim = dout.shape[-1]
    shapes = (vocabulary, dim), (tokens.shape[1], dim)
    dweight, dpositions = (
        dout.new_empty(shape if want else 0) for shape, want in zip(shapes, wanted, strict=True)
    )
    return dweight, dpositions


def _plain_embedding(tokens: Tensor, weight: Tensor, positions: Tensor) -> Tensor:
    """The same function in plain PyTorch."""
    return F.embedding(tokens, weight) + positions


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor, positions: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.shapes = weight.shape, positions.shape
        ctx.set_materialize_grads(False)
        return _FORWARD(tokens, weight, positions)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None) -> tuple[Tensor | None, ...]:
        if dout is None:
            return None, None, None
        (tokens,), wanted = ctx.saved_tensors, ctx.needs_input_grad
        if torch.is_grad_enabled():  # it is linear: gradients are the same at zeros
            tables = (dout.new_zeros(shape) for shape in ctx.shapes)
            return _functional.differentiate(_plain_embedding, (tokens, *tables), wanted, dout)
        grads = _BACKWARD(dout.contiguous(), tokens, ctx.shapes[0][0], wanted[1:])
        return None, *_functional.wanted_only(grads, wanted[1:])


def embedding(tokens: Tensor, weight: Tensor, positions: Tensor) -> Tensor:
    """weight[tokens] + positions: the input of a decoder's first block.

    Backward sums in the accumulation type, each row's terms in one order, and is deterministic, bit
    for bit. Under torch.func transforms, forward-mode AD and in double backward, plain PyTorch with
    the same result takes its place.

    Args:
        tokens: (B, T), int64, each in [0, V).
        weight: (V, d), float64, float32, bfloat16 or, on CUDA, float16.
        positions: (T, d), of weight's dtype and device.

    Returns:
        (B, T, d), of weight's dtype, under autocast too.

    Raises:
        TypeError: an argument is no tensor, or of a wrong or different dtype.
        ValueError: a shape or device is wrong.
        IndexError: a token is outside the vocabulary; on CUDA, where looking would wait for the
            device, it fails a device-side assertion, which the next synchronisation raises.
    """
    operands = _functional.operands_like("weight", weight)
    if weight.dim() != 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, expected (V, d)")
    _functional.check_indices("tokens", tokens)
    if tokens.dim() != 2:
        raise ValueError(f"tokens has shape {tuple(tokens.shape)}, expected (B, T)")
    vocab_size, dim = weight.shape
    tokens = operands.take("tokens", tokens, torch.int64, tokens.shape, "(B, T)")
    shape = tokens.shape[1], dim
    positions = operands.take("positions", positions, operands.stream, shape, "(T, d)")
    arguments = tokens, weight.contiguous(), positions
    if _functional.transforms_active():
        return _plain_embedding(*arguments)
    try:
        if _functional.needs_grad(weight, positions):
            return _Embedding.apply(*arguments)
        return _FORWARD(*arguments)
    except RuntimeError:  # of a CPU: a CUDA kernel's comes later
        if weight.is_cuda:
            raise
        for b, t in ((tokens < 0) | (tokens >= vocab_size)).nonzero()[:1].tolist():
            raise IndexError(
                f"tokens[{b}, {t}] is {tokens[b, t].item()}, expected 0 to {vocab_size - 1}"
            ) from None
        raise
