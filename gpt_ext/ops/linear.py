"""A linear layer with what stands around it in a decoder block: a norm, dropout, the residual.

The kernels are csrc/cpu/linear_*.cpp and csrc/cuda/linear_*.cu, the raw ops
torch.ops.gpt_ext.linear_forward and linear_backward.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt_ext.ops import _functional
from gpt_ext.ops._functional import Operands
from gpt_ext.ops.philox import residual_dropout

_FORWARD = torch.ops.gpt_ext.linear_forward.default
_BACKWARD = torch.ops.gpt_ext.linear_backward.default


class Norm(NamedTuple):
    """A layer norm over the last dim d (Ba et al., "Layer Normalization", 2016).

    weight and bias are (d); eps is added to the variance. An nn.LayerNorm's, as a rule.
    """

    weight: Tensor
    bias: Tensor
    eps: float = 1e-5


@torch.library.register_fake("gpt_ext::linear_forward")
def _(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    residual: Tensor | None,
    norm_eps: float,
    dropout_p: float,
    dropout_seed: Tensor | None,
    product: torch.dtype,
    allow_tf32: bool,
) -> tuple[Tensor, Tensor]:
    dtype = product if residual is None else w.dtype
    out = x.new_empty((*x.shape[:-1], w.shape[0]), dtype=dtype)
    return out, empty_statistics(x, w, norm_weight)


def empty_statistics(x: Tensor, w: Tensor, norm_weight: Tensor | None) -> Tensor:
    """For fake kernels: mean and rstd of norm(x), (2, ...), or (0) where there is no norm."""
    shape = (0,) if norm_weight is None else (2, *x.shape[:-1])
    return x.new_empty(shape, dtype=_functional.accumulation_dtype(w.dtype))


@torch.library.register_fake("gpt_ext::linear_backward")
def _(
    dout: Tensor,
    x: Tensor,
    w: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    statistics: Tensor,
    has_residual: bool,
    dropout_p: float,
    dropout_seed: Tensor | None,
    product: torch.dtype,
    allow_tf32: bool,
    wanted: list[bool],
) -> tuple[Tensor, ...]:
    norm_shape = (0,) if norm_weight is None else norm_weight.shape
    shapes = w.shape, w.shape[:1], norm_shape, norm_shape
    dx = x.new_empty(x.shape if wanted[0] else 0)
    return dx, *(
        w.new_empty(shape if want else 0) for shape, want in zip(shapes, wanted[1:], strict=True)
    )


def plain_linear(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    residual: Tensor | None,
    norm_eps: float,
    dropout_p: float,
    dropout_seed: Tensor | None,
    product: torch.dtype,
) -> Tensor:
    """The same function in plain PyTorch, the same dropout mask included."""
    with _functional.without_autocast(x.device.type):
        if norm_weight is not None:
            x = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, norm_eps)
        out = F.linear(x.to(product), w.to(product), None if b is None else b.to(product))
        out = residual_dropout(out, dropout_p, dropout_seed)
        return out if residual is None else residual + out


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        out, statistics = _FORWARD(*arguments)
        x, w, b, norm_weight, norm_bias, residual, eps, dropout_p, seed, *products = arguments
        ctx.save_for_backward(x, w, b, norm_weight, norm_bias, statistics, seed)
        ctx.rest = residual is not None, eps, dropout_p, *products
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None) -> tuple[Tensor | None, ...]:
        if dout is None:
            return (None,) * 11
        x, w, b, norm_weight, norm_bias, statistics, seed = ctx.saved_tensors
        has_residual, eps, dropout_p, product, allow_tf32 = ctx.rest
        wanted = ctx.needs_input_grad[:5]
        grads: tuple[Tensor | None, ...]
        if torch.is_grad_enabled():
            arguments = x, w, b, norm_weight, norm_bias, None, eps, dropout_p, seed, product
            grads = _functional.differentiate(plain_linear, arguments, wanted, dout.to(product))[:5]
        else:
            gradients = _BACKWARD(
                dout.contiguous(), x, w, norm_weight, norm_bias, statistics, has_residual,
                dropout_p, seed, product, allow_tf32, wanted,
            )  # fmt: skip
            grads = _functional.wanted_only(gradients, wanted)
        return *grads, dout if has_residual else None, None, None, None, None, None


def take_norm(operands: Operands, norm: Norm | None, dim: int) -> tuple[Any, Any, float]:
    """norm_weight, norm_bias and norm_eps for the raw ops, checked as Operands.take does."""
    if norm is None:
        return None, None, 0.0
    if not isinstance(norm, Norm):
        raise TypeError(f"norm is {type(norm).__name__}, expected a Norm")
    weight, bias, eps = norm
    _functional.check_number("norm.eps", eps)
    if not 0 <= eps < math.inf:
        raise ValueError(f"norm.eps is {eps}, expected finite and not negative")
    weight = operands.take("norm.weight", weight, operands.stream, (dim,), "(d)")
    bias = operands.take("norm.bias", bias, operands.stream, (dim,), "(d)")
    return weight, bias, eps


def take_rows(operands: Operands, x: Tensor, norm: Norm | None, dim: int) -> Tensor:
    """x (..., dim), of the stream's dtype where a norm reads it, checked as Operands.take does."""
    leading = x.shape[:-1] if isinstance(x, Tensor) else ()
    dtype = operands.product if norm is None else operands.stream
    return operands.take("x", x, dtype, (*leading, dim), "(..., d)")


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: Norm | None = None,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """out = residual + dropout(norm(x) weight^T + bias), over the last dim of x.

    Bias, dropout and residual are applied as the product writes out; on CPUs also the norm, as it
    reads x. Backward is deterministic, bit for bit. Under torch.func transforms, forward-mode AD
    and in double backward, plain PyTorch with the same result takes its place.

    Args:
        x: (..., d), at least one dim; any of the leading ones may be zero.
        weight, bias: (o, d) and (o) or None.
        norm: the layer norm of x, or None for none.
        residual: (..., o), what the result is added to, or None for nothing.
        dropout_p: probability, 0 to 1, of dropping each element of norm(x) weight^T + bias; what
            is kept is scaled by 1/(1 - dropout_p). The mask follows from one number drawn from
            torch's default generator of the device.

        All are float64, float32, bfloat16 or, on CUDA, float16: one dtype, one device. Under
        autocast the product is taken in its dtype, while weight, bias, norm, residual and the x
        that a norm reads stay in weight's; what comes in another dtype is cast. On CUDA, float32's
        product is taken in tf32 where torch's own are, by its setting at the time, and backward's
        as forward's. What is not contiguous is copied first.

    Returns:
        (..., o), contiguous, of weight's dtype; autocast's, under autocast without a residual.

    Raises:
        TypeError: an argument is no tensor, or of a wrong or different dtype.
        ValueError: a shape, device or value is wrong.
    """
    operands = _functional.operands_like("weight", weight)
    if weight.dim() != 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, expected (o, d)")
    out_dim, in_dim = weight.shape
    stream = operands.stream
    x = take_rows(operands, x, norm, in_dim)
    weight = weight.contiguous()
    if bias is not None:
        bias = operands.take("bias", bias, stream, (out_dim,), "(o)")
    norm_weight, norm_bias, norm_eps = take_norm(operands, norm, in_dim)
    if residual is not None:
        shape = (*x.shape[:-1], out_dim)
        residual = operands.take("residual", residual, stream, shape, "(..., o)")

    tensors = x, weight, bias, norm_weight, norm_bias, residual
    seed = _functional.draw_dropout_seed(dropout_p, operands.device)
    arguments = *tensors, norm_eps, dropout_p, seed, operands.product
    if _functional.transforms_active():
        return plain_linear(*arguments)
    allow_tf32 = _functional.allow_tf32()
    if _functional.needs_grad(*tensors):
        return _Linear.apply(*arguments, allow_tf32)
    return _FORWARD(*arguments, allow_tf32)[0]
