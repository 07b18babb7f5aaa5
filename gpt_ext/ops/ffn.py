"""The feed-forward network of a decoder block: fake kernels, autograd Function, public call.

The kernels are csrc/cpu/ffn_*.cpp and csrc/cuda/ffn_*.cu, the raw ops
torch.ops.gpt_ext.ffn_forward and ffn_backward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt_ext.ops import _functional

ACTIVATIONS = ("relu", "gelu", "gelu_tanh")  # in the order of gpt_ext::Activation, csrc/ops/ffn.h

_PLAIN_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
}


@torch.library.register_fake("gpt_ext::ffn_forward")
def _(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, activation: int
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((*x.shape[:-1], w1.shape[0]))


@torch.library.register_fake("gpt_ext::ffn_backward")
def _(
    dout: Tensor,
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    saved: Tensor,
    activation: int,
    wanted: list[bool],
) -> tuple[Tensor, ...]:
    shapes = x.shape, w1.shape, w1.shape[:1], w2.shape, w2.shape[:1]
    return tuple(
        x.new_empty(shape if want else 0) for shape, want in zip(shapes, wanted, strict=True)
    )


def _plain_feed_forward(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, activation: str
) -> Tensor:
    """The same function in plain PyTorch."""
    dtype = _functional.accumulation_dtype(x.dtype)
    with _functional.without_autocast(x.device.type):
        hidden = _PLAIN_ACTIVATIONS[activation](F.linear(x.to(dtype), w1.to(dtype), b1.to(dtype)))
        return F.linear(hidden, w2.to(dtype), b2.to(dtype)).to(x.dtype)


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, activation: str
    ) -> Tensor:
        out, saved = torch.ops.gpt_ext.ffn_forward(x, w1, b1, w2, b2, ACTIVATIONS.index(activation))
        ctx.save_for_backward(x, w1, b1, w2, b2, saved)
        ctx.activation = activation
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None) -> tuple[Tensor | None, ...]:
        if dout is None:
            return (None,) * 6
        x, w1, b1, w2, b2, saved = ctx.saved_tensors
        if torch.is_grad_enabled():
            plain = functools.partial(_plain_feed_forward, activation=ctx.activation)
            grads = torch.func.vjp(plain, x, w1, b1, w2, b2)[1](dout)
        else:
            activation, wanted = ACTIVATIONS.index(ctx.activation), list(ctx.needs_input_grad[:5])
            grads = torch.ops.gpt_ext.ffn_backward(
                dout.contiguous(), x, w1, w2, saved, activation, wanted
            )
        return *grads, None


def feed_forward(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, *, activation: str = "relu"
) -> Tensor:
    """out = act(x w1^T + b1) w2^T + b2, over the last dim of x.

    The activation is fused into the first product, its derivative into the backward of the second.
    Backward is deterministic, bit for bit. Under torch.func transforms, forward-mode AD and in
    double backward, plain PyTorch with the same result takes its place.

    Args:
        x: (..., d), at least one dim; any of the leading ones may be zero.
        w1, b1: (h, d) and (h), the first linear layer.
        w2, b2: (d, h) and (d), the second linear layer.
        activation: "relu", "gelu" (exact, by erf) or "gelu_tanh" (Hendrycks and Gimpel, 2016).

        All are float64, float32, bfloat16 or, on CUDA, float16: one dtype, one device. Under
        autocast they are cast to its dtype first (bfloat16 x with float32 weights is then fine);
        elsewhere mixed dtypes are refused, as torch.nn.functional.linear refuses them. What is not
        contiguous is copied first.

    Returns:
        (..., d), contiguous, of x's dtype (autocast's, under autocast).

    Raises:
        TypeError: an argument is no tensor, or of a wrong or different dtype.
        ValueError: a shape, device or value is wrong.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
    x, w1, b1, w2, b2 = _functional.prepare(x=x, w1=w1, b1=b1, w2=w2, b2=b2)
    if x.dim() == 0:
        raise ValueError("x has shape (), expected (..., d)")
    if w1.dim() != 2:
        raise ValueError(f"w1 has shape {tuple(w1.shape)}, expected (h, d)")
    hidden_dim, model_dim = w1.shape[0], x.shape[-1]
    _functional.check_shape("w1", w1, (hidden_dim, model_dim), "(h, d)")
    _functional.check_shape("b1", b1, (hidden_dim,), "(h)")
    _functional.check_shape("w2", w2, (model_dim, hidden_dim), "(d, h)")
    _functional.check_shape("b2", b2, (model_dim,), "(d)")

    if _functional.transforms_active():
        return _plain_feed_forward(x, w1, b1, w2, b2, activation)
    x, w1, b1, w2, b2 = (t.contiguous() for t in (x, w1, b1, w2, b2))
    if _functional.needs_grad(x, w1, b1, w2, b2):
        return _FeedForward.apply(x, w1, b1, w2, b2, activation)
    return torch.ops.gpt_ext.ffn_forward(x, w1, b1, w2, b2, ACTIVATIONS.index(activation))[0]
