"""Causal multi-head attention: fake kernels, autograd Function, public calls.

The kernels are csrc/cpu/attention_*.cpp and csrc/cuda/attention_*.cu, the raw ops
torch.ops.gpt_ext.attention_forward and attention_backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gpt_ext.ops import _functional
from gpt_ext.ops.philox import attention_keep_mask

MAX_HEAD_DIM = 256  # kMaxHeadDim of csrc/ops/attention.h

_FORWARD = torch.ops.gpt_ext.attention_forward.default
_BACKWARD = torch.ops.gpt_ext.attention_backward.default


@torch.library.register_fake("gpt_ext::attention_forward")
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    dropout_p: float,
    dropout_seed: Tensor | None,
    allow_tf32: bool,
) -> tuple[Tensor, Tensor]:
    batch, time, heads, _ = q.shape
    statistics = _functional.accumulation_dtype(q.dtype)
    return q.new_empty(q.shape), q.new_empty((batch, heads, time), dtype=statistics)


@torch.library.register_fake("gpt_ext::attention_backward")
def _(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    dropout_p: float,
    dropout_seed: Tensor | None,
    allow_tf32: bool,
) -> Tensor:
    batch, time, heads, dim = q.shape
    return q.new_empty((batch, time, 3, heads, dim))


def _plain_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, dropout_p: float, dropout_seed: Tensor | None
) -> Tensor:
    """The same function in plain PyTorch, the same dropout mask included; memory quadratic in T."""
    batch, time, heads, _ = q.shape
    dtype = _functional.accumulation_dtype(q.dtype)
    with _functional.without_autocast(q.device.type):
        scores = torch.einsum("bihd,bjhd->bhij", q.to(dtype), k.to(dtype)) * scale
        future = torch.ones(time, time, dtype=torch.bool, device=q.device).triu(1)
        probabilities = scores.masked_fill(future, -torch.inf).softmax(-1)
        if dropout_seed is not None:
            keep = attention_keep_mask(dropout_seed, dropout_p, batch, heads, time)
            kept_scale = 1 / (1 - dropout_p) if dropout_p < 1 else 0.0
            probabilities = probabilities * (keep.to(dtype) * kept_scale)
        return torch.einsum("bhij,bjhd->bihd", probabilities, v.to(dtype)).to(q.dtype)


def _heads(inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (B, T, H, D), from themselves or from one packed (B, T, 3, H, D)."""
    q, k, v = inputs if len(inputs) == 3 else inputs[0].unbind(2)
    return q, k, v


class _CausalAttention(torch.autograd.Function):
    """Of q, k, v, or of one packed tensor, whose gradient is then one packed tensor, too."""

    @staticmethod
    def forward(
        ctx: Any,
        scale: float,
        dropout_p: float,
        dropout_seed: Tensor | None,
        allow_tf32: bool,
        *inputs: Tensor,
    ) -> Tensor:
        out, lse = _FORWARD(*_heads(inputs), scale, dropout_p, dropout_seed, allow_tf32)
        ctx.save_for_backward(out, lse, dropout_seed, *inputs)
        ctx.scale, ctx.dropout_p, ctx.allow_tf32 = scale, dropout_p, allow_tf32
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None) -> tuple[Tensor | None, ...]:
        if dout is None:
            return (None,) * len(ctx.needs_input_grad)
        out, lse, seed, *inputs = ctx.saved_tensors
        options = ctx.scale, ctx.dropout_p, seed
        grads: Sequence[Tensor]
        if torch.is_grad_enabled():
            grads = torch.func.vjp(
                lambda *inputs: _plain_attention(*_heads(inputs), *options), *inputs
            )[1](dout)
        else:
            dqkv = _BACKWARD(dout.contiguous(), *_heads(inputs), out, lse, *options, ctx.allow_tf32)
            grads = dqkv.unbind(2) if len(inputs) == 3 else [dqkv]
        return None, None, None, None, *grads


def _call(name: str, inputs: Sequence[Tensor], scale: float | None, dropout_p: float) -> Tensor:
    """Attention of checked inputs, the first of which has this name."""
    first = inputs[0]
    dim = first.shape[-1]
    if not 1 <= dim <= MAX_HEAD_DIM:
        raise ValueError(f"{name} has head size D = {dim}, expected 1 to {MAX_HEAD_DIM}")
    if scale is None:
        scale = dim**-0.5
    else:
        _functional.check_number("scale", scale)
    seed = _functional.draw_dropout_seed(dropout_p, first.device)
    if _functional.transforms_active():
        return _plain_attention(*_heads(inputs), scale, dropout_p, seed)
    inputs = [x if x.stride(-1) == 1 else x.contiguous() for x in inputs]
    options = scale, dropout_p, seed, _functional.allow_tf32()
    if _functional.needs_grad(*inputs):
        return _CausalAttention.apply(*options, *inputs)
    return _FORWARD(*_heads(inputs), *options)[0]


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, dropout_p: float = 0.0
) -> Tensor:
    """out_i = sum over j <= i of softmax_j(scale * q_i . k_j) v_j, for each sequence and head.

    FlashAttention's algorithm (Dao et al., 2022): memory is linear in T, backward rebuilds the
    probabilities from the one number a row that forward saves. Backward is deterministic, bit for
    bit. Under torch.func transforms, forward-mode AD and in double backward, plain PyTorch with the
    same result takes its place, whose memory is quadratic in T.

    Args:
        q, k, v: (B, T, H, D), 1 <= D <= 256, any B, T and H, zero included; all float64, float32,
            bfloat16 or, on CUDA, float16, on one device. Any strides: views of a packed
            (B, T, 3, H, D) tensor are read in place, and only what has a last dim of another stride
            than 1 is copied first. Under autocast they are cast to its dtype first. On CUDA,
            float32's products are taken in tf32 where torch's own are, by its setting at the time
            (torch.set_float32_matmul_precision), and backward's as forward's.
        scale: factor of the scores, 1/sqrt(D) by default.
        dropout_p: probability, 0 to 1, of dropping each softmax probability; what is kept is scaled
            by 1/(1 - dropout_p). The mask follows from one number drawn from torch's default
            generator of the device, and is the same on CPU and CUDA for the same number.

    Returns:
        (B, T, H, D), contiguous, of q's dtype (autocast's, under autocast).

    Raises:
        TypeError: an argument is no tensor, or of a wrong or different dtype.
        ValueError: a shape, device or value is wrong.
    """
    q, k, v = _functional.prepare(q=q, k=k, v=v)
    if q.dim() != 4:
        raise ValueError(f"q has shape {tuple(q.shape)}, expected (B, T, H, D)")
    _functional.check_shape("k", k, q.shape, "q's shape (B, T, H, D)")
    _functional.check_shape("v", v, q.shape, "q's shape (B, T, H, D)")
    return _call("q", (q, k, v), scale, dropout_p)


def packed_causal_attention(
    qkv: Tensor, *, scale: float | None = None, dropout_p: float = 0.0
) -> Tensor:
    """causal_attention(q, k, v) of one packed tensor: qkv[:, :, 0] is q, then come k and v.

    The same numbers, bit for bit; the gradient of qkv is one tensor, written in place by backward.

    Args:
        qkv: (B, T, 3, H, D), such as a linear layer's output (B, T, 3 H D) unflattened; otherwise
            as causal_attention's q, k and v.
        scale, dropout_p: as causal_attention's.

    Returns:
        (B, T, H, D), contiguous, of qkv's dtype (autocast's, under autocast).

    Raises:
        TypeError: qkv is no tensor, or of a wrong dtype.
        ValueError: a shape, device or value is wrong.
    """
    (qkv,) = _functional.prepare(qkv=qkv)
    if qkv.dim() != 5 or qkv.shape[2] != 3:
        raise ValueError(f"qkv has shape {tuple(qkv.shape)}, expected (B, T, 3, H, D)")
    return _call("qkv", (qkv,), scale, dropout_p)
