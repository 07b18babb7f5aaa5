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
from gpt_ext.ops.linear import Norm, empty_statistics, take_norm, take_rows
from gpt_ext.ops.philox import residual_dropout

_FORWARD = torch.ops.gpt_ext.ffn_forward.default
_BACKWARD = torch.ops.gpt_ext.ffn_backward.default
ACTIVATIONS = ("relu", "gelu", "gelu_tanh")  # in the order of gpt_ext::Activation, csrc/ops/ffn.h

_PLAIN_ACTIVATIONS: tuple[Callable[[Tensor], Tensor], ...] = (
    F.relu,
    F.gelu,
    functools.partial(F.gelu, approximate="tanh"),
)


@torch.library.register_fake("gpt_ext::ffn_forward")
def _(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
    activation: int,
    dropout_p: float,
    dropout_seed: Tensor | None,
    product: torch.dtype,
    allow_tf32: bool,
) -> tuple[Tensor, ...]:
    saved = x.new_empty((*x.shape[:-1], w1.shape[0]), dtype=product)
    return x.new_empty(x.shape), saved, empty_statistics(x, w1, norm_weight)


@torch.library.register_fake("gpt_ext::ffn_backward")
def _(
    dout: Tensor,
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    saved: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    statistics: Tensor,
    activation: int,
    dropout_p: float,
    dropout_seed: Tensor | None,
    allow_tf32: bool,
    wanted: list[bool],
) -> tuple[Tensor, ...]:
    norm_shape = (0,) if norm_weight is None else norm_weight.shape
    shapes = w1.shape, w1.shape[:1], w2.shape, w2.shape[:1], norm_shape, norm_shape
    dx = x.new_empty(x.shape if wanted[0] else 0)
    return dx, *(
        w1.new_empty(shape if want else 0) for shape, want in zip(shapes, wanted[1:], strict=True)
    )


def _plain_feed_forward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
    activation: int,
    dropout_p: float,
    dropout_seed: Tensor | None,
    product: torch.dtype,
) -> Tensor:
    """The same function in plain PyTorch, the same dropout mask included."""
    with _functional.without_autocast(x.device.type):
        rows = x
        if norm_weight is not None:
            rows = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, norm_eps).to(product)
        hidden = _PLAIN_ACTIVATIONS[activation](F.linear(rows, w1.to(product), b1.to(product)))
        out = F.linear(hidden, w2.to(product), b2.to(product))
        return out if norm_weight is None else x + residual_dropout(out, dropout_p, dropout_seed)


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        out, *saved = _FORWARD(*arguments)
        *tensors, eps, activation, dropout_p, seed, product, allow_tf32 = arguments
        ctx.save_for_backward(*tensors, seed, *saved)
        ctx.rest = eps, activation, dropout_p, product, allow_tf32
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None) -> tuple[Tensor | None, ...]:
        if dout is None:
            return (None,) * 13
        x, w1, b1, w2, b2, norm_weight, norm_bias, seed, saved, statistics = ctx.saved_tensors
        eps, activation, dropout_p, product, allow_tf32 = ctx.rest
        if torch.is_grad_enabled():
            arguments = (
                x, w1, b1, w2, b2, norm_weight, norm_bias,
                eps, activation, dropout_p, seed, product,
            )  # fmt: skip
            wanted = ctx.needs_input_grad[:-1]
            return *_functional.differentiate(_plain_feed_forward, arguments, wanted, dout), None
        wanted = ctx.needs_input_grad[:7]
        grads = _BACKWARD(
            dout.contiguous(), x, w1, w2, saved, norm_weight, norm_bias, statistics,
            activation, dropout_p, seed, allow_tf32, wanted,
        )  # fmt: skip
        return *_functional.wanted_only(grads, wanted), None, None, None, None, None, None


def feed_forward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    *,
    activation: str = "relu",
    norm: Norm | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """ffn(x) = act(x w1^T + b1) w2^T + b2, over the last dim of x.

    With a norm it is the whole sub-layer of a pre-norm block, x + dropout(ffn(norm(x))).

    The activation is fused into the first product, its derivative into the backward of the second,
    dropout and the residual into the second, and on CPUs the norm into the first. Backward is
    deterministic, bit for bit. Under torch.func transforms, forward-mode AD and in double backward,
    plain PyTorch with the same result takes its place.

    Args:
        x: (..., d), at least one dim; any of the leading ones may be zero.
        w1, b1: (h, d) and (h), the first linear layer.
        w2, b2: (d, h) and (d), the second linear layer.
        activation: "relu", "gelu" (exact, by erf) or "gelu_tanh" (Hendrycks and Gimpel, 2016).
        norm: the layer norm of x, or None for ffn(x) alone.
        dropout_p: with a norm, the probability, 0 to 1, of dropping each element of ffn(norm(x));
            what is kept is scaled by 1/(1 - dropout_p). The mask follows from one number drawn
            from torch's default generator.

        All are float64, float32, bfloat16 or, on CUDA, float16: one dtype, one device. Under
        autocast the products are taken in its dtype, while the parameters, and the x that a norm
        reads, stay in w1's; what comes in another dtype is cast. Elsewhere mixed dtypes are
        refused, as torch.nn.functional.linear refuses them. On CUDA, float32's products are taken
        in tf32 where torch's own are, by its setting at the time, and backward's as forward's.
        What is not contiguous is copied first.

    Returns:
        (..., d), contiguous, of w1's dtype; autocast's, under autocast without a norm.

    Raises:
        TypeError: an argument is no tensor, or of a wrong or different dtype.
        ValueError: a shape, device or value is wrong.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
    _functional.check_number("dropout_p", dropout_p)
    if norm is None and dropout_p != 0:
        raise ValueError(f"dropout_p is {dropout_p}, expected 0 without a norm")
    operands = _functional.operands_like("w1", w1)
    if w1.dim() != 2:
        raise ValueError(f"w1 has shape {tuple(w1.shape)}, expected (h, d)")
    hidden_dim, model_dim = w1.shape
    stream = operands.stream
    x = take_rows(operands, x, norm, model_dim)
    w1 = operands.take("w1", w1, stream, (hidden_dim, model_dim), "(h, d)")
    b1 = operands.take("b1", b1, stream, (hidden_dim,), "(h)")
    w2 = operands.take("w2", w2, stream, (model_dim, hidden_dim), "(d, h)")
    b2 = operands.take("b2", b2, stream, (model_dim,), "(d)")
    norm_weight, norm_bias, norm_eps = take_norm(operands, norm, model_dim)

    tensors = x, w1, b1, w2, b2, norm_weight, norm_bias
    seed = _functional.draw_dropout_seed(dropout_p, operands.device)
    arguments = *tensors, norm_eps, ACTIVATIONS.index(activation), dropout_p, seed, operands.product
    if _functional.transforms_active():
        return _plain_feed_forward(*arguments)
    allow_tf32 = _functional.allow_tf32()
    if _functional.needs_grad(*tensors):
        return _FeedForward.apply(*arguments, allow_tf32)
    return _FORWARD(*arguments, allow_tf32)[0]
