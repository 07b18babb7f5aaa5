"""Wrong arguments of attention: one clear error, from the public calls and from the raw ops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gpt_ext.ops import causal_attention, packed_causal_attention

RAW_FORWARD = torch.ops.gpt_ext.attention_forward
RAW_BACKWARD = torch.ops.gpt_ext.attention_backward

X = torch.ones(2, 5, 3, 4)

WRONG = {
    "no tensor": (([1.0], X, X), {}, TypeError, "q is list, expected a torch.Tensor"),
    "integers": ((X.long(),) * 3, {}, TypeError, "q has dtype torch.int64, expected float64, "),
    "complex": ((X.cfloat(),) * 3, {}, TypeError, "q has dtype torch.complex64"),
    "half on CPU": ((X.half(),) * 3, {}, TypeError, "q has dtype torch.float16, .* CUDA only"),
    "mixed dtypes": ((X, X, X.double()), {}, TypeError, "v has dtype torch.float64, .*float32"),
    "mixed devices": ((X, X.to("meta"), X), {}, ValueError, "k is on meta, expected cpu as q"),
    "rank": ((X[0],) * 3, {}, ValueError, r"q has shape \(5, 3, 4\), expected \(B, T, H, D\)"),
    "scalar": ((X[0, 0, 0, 0],) * 3, {}, ValueError, r"q has shape \(\), expected"),
    "shapes": ((X, X[:, :4], X), {}, ValueError, r"k has shape \(2, 4, 3, 4\), expected .*2, 5, 3"),
    "v's rank": ((X, X, X[0]), {}, ValueError, r"v has shape \(5, 3, 4\)"),
    "head size 0": ((X[..., :0],) * 3, {}, ValueError, "head size D = 0, expected 1 to 256"),
    "head size 257": ((torch.ones(1, 2, 1, 257),) * 3, {}, ValueError, "D = 257, expected 1 to"),
    "scale": ((X, X, X), {"scale": X[0, 0, 0, 0]}, TypeError, "scale is tensor.*, expected a numb"),
    "dropout -0.1": ((X, X, X), {"dropout_p": -0.1}, ValueError, "dropout_p is -0.1, expected 0"),
    "dropout 1.1": ((X, X, X), {"dropout_p": 1.1}, ValueError, "dropout_p is 1.1, expected 0 to 1"),
    "dropout nan": ((X, X, X), {"dropout_p": float("nan")}, ValueError, "dropout_p is nan"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case: str) -> None:
    arguments, options, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        causal_attention(*arguments, **options)


WRONG_PACKED = {
    "no tensor": (None, {}, TypeError, "qkv is NoneType, expected a torch.Tensor"),
    "dtype": (torch.ones(2, 5, 3, 3, 4).int(), {}, TypeError, "qkv has dtype torch.int32, expect"),
    "rank": (X, {}, ValueError, r"qkv has shape \(2, 5, 3, 4\), expected \(B, T, 3, H, D\)"),
    "not three": (X[None], {}, ValueError, r"qkv has shape \(1, 2, 5, 3, 4\), expected \(B, T, 3"),
    "head size": (torch.ones(1, 1, 3, 1, 0), {}, ValueError, "qkv has head size D = 0, expected"),
    "dropout": (torch.ones(1, 1, 3, 1, 2), {"dropout_p": 2}, ValueError, "dropout_p is 2, expect"),
}


@pytest.mark.parametrize("case", WRONG_PACKED)
def test_wrong_packed_arguments(case: str) -> None:
    qkv, options, error, message = WRONG_PACKED[case]
    with pytest.raises(error, match=message):
        packed_causal_attention(qkv, **options)


SEED = torch.tensor([1])
LSE = torch.zeros(2, 3, 5)

WRONG_RAW = {
    "integers": ((X.long(),) * 3, (0.0, None), "q has dtype Long, expected float64"),
    "half on CPU": ((X.half(),) * 3, (0.0, None), "q has dtype float16, which is for CUDA only"),
    "mixed dtypes": ((X, X.double(), X), (0.0, None), "k has dtype Double, expected Float"),
    "rank": ((X[0], X, X), (0.0, None), r"q has shape \(5, 3, 4\), expected \(B, T, H, D\)"),
    "shapes": ((X, X, X[:, 1:]), (0.0, None), r"v has shape \(2, 4, 3, 4\), expected \(2, 5, 3"),
    "head size": ((torch.ones(1, 1, 1, 257),) * 3, (0.0, None), "q has head size 257, expected 1"),
    "strided": ((X, X, X.mT.contiguous().mT), (0.0, None), "v has stride 3 in its last dim"),
    "dropout": ((X, X, X), (2.0, SEED), "dropout_p is 2, expected 0 to 1"),
    "no seed": ((X, X, X), (0.5, None), "dropout_seed is None, expected a tensor"),
    "seed's dtype": ((X, X, X), (0.5, SEED.int()), "dropout_seed has dtype Int, expected Long"),
    "seed's shape": ((X, X, X), (0.5, SEED[0]), r"dropout_seed has shape \(\), expected \(1\)"),
}


@pytest.mark.parametrize("case", WRONG_RAW)
def test_raw_ops_refuse(case: str) -> None:
    inputs, dropout, message = WRONG_RAW[case]
    with pytest.raises(RuntimeError, match=message):
        RAW_FORWARD(*inputs, 0.5, *dropout, False)
    with pytest.raises(RuntimeError, match=message):
        RAW_BACKWARD(X, *inputs, X, LSE, 0.5, *dropout, False)


@pytest.mark.parametrize(
    ("dout", "out", "lse", "message"),
    [
        (X.double(), X, LSE, "dout has dtype Double, expected Float"),
        (X[1:], X, LSE, r"dout has shape \(1, 5, 3, 4\), expected \(2, 5, 3, 4\)"),
        (X[:1, :1, :1, :1].expand_as(X), X, LSE, "dout has stride 0 in its last dim, expected 1"),
        (X, X.bfloat16(), LSE, "out has dtype BFloat16, expected Float"),
        (X, X, LSE.double(), "lse has dtype Double, expected Float"),
        (X, X, LSE.mT, r"lse has shape \(2, 5, 3\), expected \(2, 3, 5\)"),
        (X, X, LSE.mT.contiguous().mT, "lse has shape .* and strides .*, expected contiguous"),
    ],
)
def test_raw_backward_refuses(dout: Tensor, out: Tensor, lse: Tensor, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        RAW_BACKWARD(dout, X, X, X, out, lse, 0.5, 0.0, None, False)
