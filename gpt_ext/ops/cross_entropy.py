"""A language model's loss over its vocabulary projection: fake kernel, Function, public call.

The kernels are csrc/cpu/cross_entropy_forward.cpp and csrc/cuda/cross_entropy_forward.cu, the raw
op torch.ops.gpt_ext.cross_entropy_forward; its backward is linear_backward with the gradient of the
logits, which forward leaves.
"""

from __future__ import annotations

from numbers import Integral
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt_ext.ops import _functional
from gpt_ext.ops.linear import Norm, empty_statistics, plain_linear, take_norm, take_rows

_FORWARD = torch.ops.gpt_ext.cross_entropy_forward.default
_BACKWARD = torch.ops.gpt_ext.linear_backward.default


@torch.library.register_fake("gpt_ext::cross_entropy_forward")
def _(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    targets: Tensor,
    norm_eps: float,
    ignore_index: int,
    product: torch.dtype,
    allow_tf32: bool,
    want_dlogits: bool,
) -> tuple[Tensor, ...]:
    loss = x.new_empty((), dtype=_functional.accumulation_dtype(w.dtype))
    dlogits = x.new_empty((*x.shape[:-1], w.shape[0]) if want_dlogits else 0, dtype=product)
    return loss, dlogits, empty_statistics(x, w, norm_weight)


def _plain_cross_entropy(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    targets: Tensor,
    norm_eps: float,
    ignore_index: int,
    product: torch.dtype,
) -> Tensor:
    """The same function in plain PyTorch."""
    logits = plain_linear(x, w, b, norm_weight, norm_bias, None, norm_eps, 0.0, None, product)
    logits = logits.to(_functional.accumulation_dtype(w.dtype)).flatten(0, -2)
    return F.cross_entropy(logits, targets.flatten(), ignore_index=ignore_index)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        loss, *saved = _FORWARD(*arguments, True)
        *tensors, eps, ignore_index, product, allow_tf32 = arguments
        ctx.save_for_backward(*tensors, *saved)
        ctx.rest = eps, ignore_index, product, allow_tf32
        ctx.set_materialize_grads(False)
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor | None) -> tuple[Tensor | None, ...]:
        if dloss is None:
            return (None,) * 10
        x, w, b, norm_weight, norm_bias, targets, dlogits, statistics = ctx.saved_tensors
        eps, ignore_index, product, allow_tf32 = ctx.rest
        if torch.is_grad_enabled():
            arguments = x, w, b, norm_weight, norm_bias, targets, eps, ignore_index, product
            wanted = ctx.needs_input_grad[:-1]
            return *_functional.differentiate(_plain_cross_entropy, arguments, wanted, dloss), None
        wanted = ctx.needs_input_grad[:5]
        if not _functional.is_known_to_be_one(dloss):
            dlogits = dlogits * dloss
        grads = _BACKWARD(
            dlogits, x, w, norm_weight, norm_bias, statistics, False, 0.0, None,
            product, allow_tf32, wanted,
        )  # fmt: skip
        return *_functional.wanted_only(grads, wanted), None, None, None, None, None


def cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    norm: Norm | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """Mean over rows of the cross-entropy of targets under softmax(norm(x) weight^T + bias).

    torch.nn.functional.cross_entropy of the logits, which forward turns into their gradient where
    they lie: that is all backward needs, and the only array of their size, but for a loss that was
    scaled, or is on CUDA: of such backward makes another. It is deterministic, bit for bit. Under
    torch.func transforms, forward-mode AD and in double backward, plain PyTorch with the same
    result takes its place.

    Args:
        x: (..., d), at least one dim.
        weight, bias: (V, d) and (V) or None, the projection to the vocabulary.
        targets: (...), int64, each in [0, V) or ignore_index.
        norm: the layer norm of x, or None for none.
        ignore_index: rows with this target are left out of the mean; without any row it is NaN.

        Dtypes and devices are as for `gpt_ext.ops.linear`.

    Returns:
        The loss in nats, (), of weight's dtype, or float32 if that is narrower.

    Raises:
        TypeError: an argument is no tensor, or of a wrong or different dtype.
        ValueError: a shape, device or value is wrong.
        IndexError: a target is outside the vocabulary; on CUDA, where looking would wait for the
            device, it fails a device-side assertion, which the next synchronisation raises.
    """
    operands = _functional.operands_like("weight", weight)
    if weight.dim() != 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, expected (V, d)")
    vocab_size, dim = weight.shape
    x = take_rows(operands, x, norm, dim)
    weight = weight.contiguous()
    if bias is not None:
        bias = operands.take("bias", bias, operands.stream, (vocab_size,), "(V)")
    norm_weight, norm_bias, norm_eps = take_norm(operands, norm, dim)
    _functional.check_indices("targets", targets)
    _functional.check_number("ignore_index", ignore_index, Integral, "an integer")
    targets = operands.take("targets", targets, torch.int64, x.shape[:-1], "x's leading dims")

    tensors = x, weight, bias, norm_weight, norm_bias
    arguments = *tensors, targets, norm_eps, ignore_index, operands.product
    if _functional.transforms_active():
        return _plain_cross_entropy(*arguments)
    allow_tf32 = _functional.allow_tf32()
    try:
        if _functional.needs_grad(*tensors):
            return _CrossEntropy.apply(*arguments, allow_tf32)
        return _FORWARD(*arguments, allow_tf32, False)[0]
    except RuntimeError:  # of a CPU: a CUDA kernel's comes later
        if weight.is_cuda:
            raise
        _check_targets(targets, vocab_size, ignore_index)
        raise


def _check_targets(targets: Tensor, vocab_size: int, ignore_index: int) -> None:
    """Raises IndexError, naming the first target that is neither in the vocabulary nor ignored."""
    outside = ((targets < 0) | (targets >= vocab_size)) & (targets != ignore_index)
    for place in outside.nonzero()[:1].tolist():
        raise IndexError(
            f"targets{place} is {targets[tuple(place)].item()}, "
            f"expected 0 to {vocab_size - 1} or ignore_index = {ignore_index}"
        )
