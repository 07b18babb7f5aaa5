"""Wrong arguments of the feed-forward network: one clear error, also from the raw ops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gpt_ext.ops import Norm, feed_forward

RAW_FORWARD = torch.ops.gpt_ext.ffn_forward
RAW_BACKWARD = torch.ops.gpt_ext.ffn_backward

X, W1, B1, W2, B2 = INPUTS = [torch.ones(n) for n in ((4, 3), (5, 3), (5,), (3, 5), (3,))]


def replaced(**changes: Tensor) -> tuple[Tensor, ...]:
    return tuple({"x": X, "w1": W1, "b1": B1, "w2": W2, "b2": B2, **changes}.values())


WRONG = {
    "no tensor": (replaced(b1=None), TypeError, "b1 is NoneType, expected a torch.Tensor"),
    "integers": ([t.int() for t in INPUTS], TypeError, "w1 has dtype torch.int32, expected float"),
    "half on CPU": ([t.half() for t in INPUTS], TypeError, "w1 has dtype torch.float16, .*CUDA"),
    "mixed": (replaced(x=X.bfloat16()), TypeError, "x has dtype torch.bfloat16, .*float32 as w1"),
    "device": (replaced(w2=W2.to("meta")), ValueError, "w2 is on meta, expected cpu as w1"),
    "x scalar": (replaced(x=X[0, 0]), ValueError, r"x has shape \(\), expected \(..., d\)"),
    "w1's rank": (replaced(w1=B1), ValueError, r"w1 has shape \(5,\), expected \(h, d\)"),
    "w1's d": (replaced(w1=W1[:, 1:]), ValueError, r"x .*\(4, 3\), expected \(..., d\) = \(4, 2\)"),
    "b1": (replaced(b1=B2), ValueError, r"b1 has shape \(3,\), expected \(h\) = \(5,\)"),
    "w2": (replaced(w2=W1), ValueError, r"w2 has shape \(5, 3\), expected \(d, h\) = \(3, 5\)"),
    "b2": (replaced(b2=B1), ValueError, r"b2 has shape \(5,\), expected \(d\) = \(3,\)"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case: str) -> None:
    inputs, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        feed_forward(*inputs)


def test_unknown_activation() -> None:
    with pytest.raises(ValueError, match="activation is 'swish', expected one of relu, gelu, gelu"):
        feed_forward(*INPUTS, activation="swish")


def test_dropout_needs_a_norm() -> None:
    with pytest.raises(TypeError, match="dropout_p is 'x', expected a number"):
        feed_forward(*INPUTS, dropout_p="x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"dropout_p is 0\.1, expected 0 without a norm"):
        feed_forward(*INPUTS, dropout_p=0.1)


def test_wrong_norm() -> None:
    with pytest.raises(ValueError, match=r"norm.weight has shape \(5,\), expected \(d\) = \(3,\)"):
        feed_forward(*INPUTS, norm=Norm(B1, B2))


NO_NORM = None, None, 0.0  # weight, bias, eps
NO_DROPOUT = 0.0, None
WRONG_RAW = {
    "integers": ([t.int() for t in INPUTS], {}, "w1 has dtype Int, expected float64"),
    "half on CPU": ([t.half() for t in INPUTS], {}, "w1 has dtype float16, which is for CUDA only"),
    "mixed dtypes": (replaced(b1=B1.double()), {}, "b1 has dtype Double, expected Float"),
    "x scalar": (replaced(x=X[0, 0]), {}, r"x has shape \(\), expected \(..., d\)"),
    "w1's rank": (replaced(w1=B1), {}, r"w1 has shape \(5\), expected \(h, d\)"),
    "x's shape": (replaced(w1=W2), {}, r"x has shape \(4, 3\), expected \(4, 5\)"),
    "w2's shape": (replaced(w2=W1), {}, r"w2 has shape \(5, 3\), expected \(3, 5\)"),
    "b1's shape": (replaced(b1=B2), {}, r"b1 has shape \(3\), expected \(5\)"),
    "b2's shape": (replaced(b2=B1), {}, r"b2 has shape \(5\), expected \(3\)"),
    "strided x": (replaced(x=X.mT.contiguous().mT), {}, "x has shape .*, expected contiguous"),
    "strided w1": (replaced(w1=W1.mT.contiguous().mT), {}, "w1 has shape .*, expected contiguous"),
    "activation": (INPUTS, {3: 3}, r"activation is 3, expected 0 \(relu\), 1 \(gelu\) or 2"),
    "half a norm": (INPUTS, {0: B2}, "norm_weight is a tensor, norm_bias is None, expected both"),
    "norm's shape": (INPUTS, {0: B1, 1: B1}, r"norm_weight has shape \(5\), expected \(3\)"),
    "dropout": (INPUTS, {4: 0.1}, "dropout_p is 0.1, expected 0 without a norm"),
    "no seed": (INPUTS, {0: B2, 1: B2, 4: 0.1}, "dropout_seed is None, expected a tensor"),
    "product": (INPUTS, {6: torch.float64}, "product is Double, expected Float as w1 or"),
    "x is product's": (INPUTS, {6: torch.bfloat16}, "x has dtype Float, expected BFloat16"),
}


@pytest.mark.parametrize("case", WRONG_RAW)
def test_raw_forward_refuses(case: str) -> None:
    inputs, changes, message = WRONG_RAW[case]
    rest = (*NO_NORM, 0, *NO_DROPOUT, torch.float32, False)
    with pytest.raises(RuntimeError, match=message):
        RAW_FORWARD(*inputs, *(changes.get(i, argument) for i, argument in enumerate(rest)))


SAVED = torch.zeros(4, 5)
STATISTICS = torch.empty(0)
ALL = [True] * 5 + [False] * 2
GOOD_BACKWARD = [X, X, W1, W2, SAVED, None, None, STATISTICS, 0, *NO_DROPOUT, False, ALL]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({0: X.double()}, "dout has dtype Double, expected Float"),
        ({0: X[1:]}, r"dout has shape \(3, 3\), expected \(4, 3\)"),
        ({0: X[:1].expand(4, 3)}, r"dout .* strides \(0, 1\), expected con"),
        ({1: X.long()}, "x has dtype Long, expected Float"),
        ({2: W1[:, 1:].contiguous()}, r"x has shape \(4, 3\), expected \(4, 2\)"),
        ({3: W2[1:]}, r"w2 has shape \(2, 5\), expected \(3, 5\)"),
        ({4: SAVED.double()}, "product is Double, expected Float as w1"),
        ({4: SAVED.bfloat16()}, "x has dtype Float, expected BFloat16"),
        ({4: SAVED[1:]}, r"saved has shape \(3, 5\), expected \(4, 5\)"),
        ({5: B2, 6: B2}, r"statistics has shape \(0\), expected \(2, 4\)"),
        ({7: STATISTICS.double()}, "statistics has dtype Double, expected Float"),
        ({8: -1}, "activation is -1, expected 0"),
        ({12: ALL[1:]}, "wanted has 6 flags, expected 7"),
    ],
)
def test_raw_backward_refuses(changes: dict[int, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        RAW_BACKWARD(*(changes.get(i, argument) for i, argument in enumerate(GOOD_BACKWARD)))
