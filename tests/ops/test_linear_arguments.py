"""Wrong arguments of the linear layer: one clear error, from the public call and the raw ops."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gpt_ext.ops import Norm, linear

RAW_FORWARD = torch.ops.gpt_ext.linear_forward
RAW_BACKWARD = torch.ops.gpt_ext.linear_backward
P = 0.3

X, W, B, NW, NB, R = [torch.ones(n) for n in ((4, 3), (5, 3), (5,), (3,), (3,), (4, 5))]
T = {"x": X, "weight": W, "bias": B, "norm_weight": NW, "norm_bias": NB, "residual": R}


def call(x: Any, weight: Any, bias: Any, norm_weight: Any, norm_bias: Any, residual: Any) -> Tensor:
    return linear(x, weight, bias, norm=Norm(norm_weight, norm_bias), residual=residual)


WRONG = {
    "no tensor": ({"x": None}, TypeError, "x is NoneType, expected a torch.Tensor"),
    "no weight": ({"weight": 1}, TypeError, "weight is int, expected a torch.Tensor"),
    "integers": ({"weight": W.int()}, TypeError, "weight has dtype torch.int32, expected float64"),
    "half on CPU": ({"weight": W.half()}, TypeError, "weight has dtype torch.float16, .*CUDA"),
    "mixed": ({"x": X.bfloat16()}, TypeError, "x has dtype torch.bfloat16, .*float32 as weight"),
    "device": ({"bias": B.to("meta")}, ValueError, "bias is on meta, expected cpu as weight"),
    "x scalar": ({"x": X[0, 0]}, ValueError, r"x has shape \(\), expected \(..., d\) = \(3,\)"),
    "x's d": ({"x": X[:, 1:]}, ValueError, r"x has shape \(4, 2\), expected \(..., d\) = \(4, 3\)"),
    "weight's rank": ({"weight": B}, ValueError, r"weight has shape \(5,\), expected \(o, d\)"),
    "bias": ({"bias": NB}, ValueError, r"bias has shape \(3,\), expected \(o\) = \(5,\)"),
    "norm": ({"norm_weight": B}, ValueError, r"norm.weight .* \(5,\), expected \(d\) = \(3,\)"),
    "norm's bias": ({"norm_bias": None}, TypeError, "norm.bias is NoneType, expected a torch.Ten"),
    "residual": ({"residual": X}, ValueError, r"residual .*\(4, 3\), expected \(..., o\) = \(4, 5"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case: str) -> None:
    change, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        call(**{**T, **change})


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan")])
def test_dropout_is_a_probability(p: float) -> None:
    with pytest.raises(ValueError, match=f"dropout_p is {p}, expected 0 to 1"):
        linear(X, W, dropout_p=p)


def test_what_is_no_number_is_told_as_such() -> None:
    with pytest.raises(TypeError, match="dropout_p is None, expected a number"):
        linear(X, W, dropout_p=None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="norm is LayerNorm, expected a Norm"):
        linear(X, W, norm=nn.LayerNorm(X.shape[-1]))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"norm\.eps is 'a', expected a number"):
        linear(X, W, norm=Norm(NW, NB, "a"))  # type: ignore[arg-type]


@pytest.mark.parametrize("eps", [-1.0, float("nan"), float("inf")])
def test_an_eps_that_is_none_is_told(eps: float) -> None:
    with pytest.raises(ValueError, match=rf"norm\.eps is {eps}, expected finite and not negative"):
        linear(X, W, norm=Norm(NW, NB, eps))


def test_numbers_of_numpy_are_numbers() -> None:
    half, eps = np.float32(0.5), np.float32(1e-5)
    results = []
    for p, e in ((half, eps), (float(half), float(eps))):
        torch.manual_seed(0)
        results.append(linear(X, W, norm=Norm(NW, NB, e), dropout_p=p))  # type: ignore[arg-type]
    assert torch.equal(*results)


SEED = torch.tensor([1])
GOOD = [X, W, B, NW, NB, R, 1e-5, P, SEED, torch.float32, False]
WRONG_RAW = {
    "integers": ({1: W.int()}, "w has dtype Int, expected float64"),
    "half on CPU": ({1: W.half()}, "w has dtype float16, which is for CUDA only"),
    "mixed dtypes": ({2: B.double()}, "b has dtype Double, expected Float"),
    "x scalar": ({0: X[0, 0]}, r"x has shape \(\), expected \(..., d\)"),
    "x's shape": ({0: X[:, 1:]}, r"x has shape \(4, 2\), expected \(4, 3\)"),
    "strided x": ({0: X.mT.contiguous().mT}, "x has shape .*, expected contiguous"),
    "w's rank": ({1: B}, r"w has shape \(5\), expected \(o, d\)"),
    "strided w": ({1: W.mT.contiguous().mT}, "w has shape .*, expected contiguous"),
    "b's shape": ({2: NB}, r"b has shape \(3\), expected \(5\)"),
    "half a norm": ({4: None}, "norm_weight is a tensor, norm_bias is None, expected both or nei"),
    "norm's shape": ({3: B}, r"norm_weight has shape \(5\), expected \(3\)"),
    "norm's dtype": ({4: NB.bfloat16()}, "norm_bias has dtype BFloat16, expected Float"),
    "residual's shape": ({5: X}, r"residual has shape \(4, 3\), expected \(4, 5\)"),
    "eps": ({6: -1.0}, "norm_eps is -1, expected 0 or more"),
    "p": ({7: 1.5}, "dropout_p is 1.5, expected 0 to 1"),
    "no seed": ({8: None}, "dropout_seed is None, expected a tensor as dropout_p > 0"),
    "seed's dtype": ({8: SEED.int()}, "dropout_seed has dtype Int, expected Long"),
    "product": ({9: torch.float64}, "product is Double, expected Float as w or, .*, BFloat16"),
    "x is product's": ({3: None, 4: None, 9: torch.bfloat16}, "x has dtype Float, expected BFloa"),
}


@pytest.mark.parametrize("case", WRONG_RAW)
def test_raw_forward_refuses(case: str) -> None:
    changes, message = WRONG_RAW[case]
    with pytest.raises(RuntimeError, match=message):
        RAW_FORWARD(*(changes.get(i, argument) for i, argument in enumerate(GOOD)))


STATISTICS = torch.ones(2, 4)
GOOD_BACKWARD = [R, X, W, NW, NB, STATISTICS, True, P, SEED, torch.float32, False, [True] * 5]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({0: R.double()}, "dout has dtype Double, expected Float"),
        ({0: R[1:]}, r"dout has shape \(3, 5\), expected \(4, 5\)"),
        ({0: R[:1].expand(4, 5)}, r"dout .* strides \(0, 1\), expected contiguous"),
        ({6: False, 9: torch.bfloat16}, "dout has dtype Float, expected BFloat16"),
        ({1: X.long()}, "x has dtype Long, expected Float"),
        ({2: W[:, 1:].contiguous()}, r"x has shape \(4, 3\), expected \(4, 2\)"),
        ({5: STATISTICS.double()}, "statistics has dtype Double, expected Float"),
        ({5: STATISTICS[:1]}, r"statistics has shape \(1, 4\), expected \(2, 4\)"),
        ({3: None, 4: None}, r"statistics has shape \(2, 4\), expected \(0\)"),
        ({11: [True] * 4}, "wanted has 4 flags, expected 5"),
    ],
)
def test_raw_backward_refuses(changes: dict[int, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        RAW_BACKWARD(*(changes.get(i, argument) for i, argument in enumerate(GOOD_BACKWARD)))
