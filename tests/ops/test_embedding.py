"""Token and position embeddings, added: values, gradients, and every promise made of them."""

from __future__ import annotations

from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
from compare import MODES, assert_as_good_as_torch, autocast_of
from torch import Tensor

from gpt_ext.ops import embedding

RAW_FORWARD = torch.ops.gpt_ext.embedding_forward
RAW_BACKWARD = torch.ops.gpt_ext.embedding_backward
SIZES = [  # B, T, V, d: tokens that repeat, and rows of the table that none reads
    (1, 1, 1, 1),
    (2, 3, 50, 7),
    (3, 17, 5, 42),
    (4, 33, 104, 252),
    (7, 40, 1000, 65),
]


def make(
    batch: int, time: int, vocabulary: int, d: int, device: str, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, list[Tensor]]:
    """tokens, and weight and positions."""
    tokens = torch.randint(vocabulary, (batch, time), device=device)
    shapes = (vocabulary, d), (time, d)
    return tokens, [torch.randn(shape, device=device, dtype=dtype) for shape in shapes]


def results(tokens: Tensor, tables: list[Tensor], dout: Tensor) -> list[Tensor]:
    return reference.with_gradients(lambda *t: embedding(tokens, *t), tables, dout)


def test_tables_may_change_before_backward(backend: str) -> None:
    tokens, (weight, positions) = make(2, 3, 50, 7, backend)
    weight.requires_grad_()
    out = embedding(tokens, weight, positions)
    positions.add_(1)
    (dweight,) = torch.autograd.grad(out.sum(), weight)
    counts = torch.bincount(tokens.flatten(), minlength=50).float()
    torch.testing.assert_close(dweight, counts[:, None].expand(50, 7))


@pytest.mark.parametrize("mode", MODES)
def test_values_and_gradients(mode: str, device: str) -> None:
    for sizes in SIZES:
        tokens, tables = make(*sizes, device, MODES[mode])
        dout = torch.randn(*tokens.shape, sizes[-1], device=device, dtype=MODES[mode])
        with autocast_of(mode, device):
            ours = results(tokens, tables, dout)
            torchs = reference.with_gradients(
                lambda *t, tokens=tokens: F.embedding(tokens, t[0]) + t[1], tables, dout
            )
        places = tokens.cpu()
        exact = reference.exact(lambda *t, places=places: t[0][places] + t[1], tables, dout)
        assert_as_good_as_torch(["out", "weight", "positions"], ours, torchs, exact)


def test_rows_that_no_token_reads_have_no_gradient(device: str) -> None:
    _, tables = make(2, 3, 100, 6, device)
    tokens = torch.tensor([[7, 7, 50], [7, 99, 50]], device=device)
    _, dweight, _ = results(tokens, tables, torch.ones(2, 3, 6, device=device))
    expected = torch.zeros(100, 6, device=device)
    expected[7], expected[50], expected[99] = 3, 2, 1
    assert torch.equal(dweight, expected)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)], ids=str)
def test_no_tokens(shape: tuple[int, int], device: str) -> None:
    tokens, tables = make(*shape, 5, 6, device)
    out, *gradients = results(tokens, tables, torch.ones(*shape, 6, device=device))
    assert out.shape == (*shape, 6)
    for gradient, table in zip(gradients, tables, strict=True):
        assert torch.equal(gradient, torch.zeros_like(table))


def test_tables_and_gradients_may_be_strided(device: str) -> None:
    tokens, (weight, positions) = make(3, 8, 20, 6, device)
    dout = torch.randn(3, 8, 6, device=device)
    expected = results(tokens, [weight, positions], dout)
    strided = results(
        tokens.T.contiguous().T,
        [weight.T.contiguous().T, positions.T.contiguous().T],
        dout.transpose(0, 1).contiguous().transpose(0, 1),
    )
    assert all(map(torch.equal, strided, expected))


def test_threads_and_repeats_change_nothing(device: str) -> None:
    tokens, tables = make(16, 64, 50, 65, device)
    dout = torch.randn(16, 64, 65, device=device)
    every = []
    for threads in (1, 2, 3, 4, 4):
        torch.set_num_threads(threads)
        every.append(results(tokens, tables, dout))
    for one in every[1:]:
        assert all(map(torch.equal, one, every[0]))


@pytest.mark.parametrize("wanted", range(2), ids=["weight", "positions"])
def test_each_gradient_alone(wanted: int, device: str) -> None:
    tokens, tables = make(2, 5, 9, 6, device)
    dout = torch.randn(2, 5, 6, device=device)
    every = results(tokens, tables, dout)[1:]
    tables[wanted].requires_grad_()
    embedding(tokens, *tables).backward(dout)
    assert torch.equal(tables[wanted].grad, every[wanted])
    assert tables[1 - wanted].grad is None


def test_without_a_gradient_the_values_are_the_same(device: str) -> None:
    tokens, tables = make(2, 5, 9, 6, device)
    out = embedding(tokens, *tables)
    assert not out.requires_grad
    assert torch.equal(out, results(tokens, tables, torch.ones_like(out))[0])


# What torch checks


def test_gradcheck(device: str) -> None:
    tokens, tables = make(2, 3, 4, 3, device, torch.float64)
    leaves = [t.requires_grad_() for t in tables]
    call = lambda *t: embedding(tokens, *t)  # noqa: E731
    assert torch.autograd.gradcheck(call, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, leaves)


def test_transforms(device: str) -> None:
    tokens, tables = make(2, 3, 4, 3, device)
    grads = torch.func.grad(lambda *t: embedding(tokens, *t).square().sum(), argnums=(0, 1))
    dout = 2 * embedding(tokens, *tables)
    for one, other in zip(grads(*tables), results(tokens, tables, dout)[1:], strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype: torch.dtype, device: str) -> None:
    tokens, tables = make(2, 3, 9, 5, device, dtype)
    torch.library.opcheck(RAW_FORWARD, [tokens, *tables])
    dout = torch.randn(2, 3, 5, device=device, dtype=dtype)
    for wanted in ([True, True], [False, True], [True, False]):
        torch.library.opcheck(RAW_BACKWARD, [dout, tokens, 9, wanted])


def test_compile(device: str) -> None:
    tokens, tables = make(2, 5, 9, 6, device)
    leaves = [t.requires_grad_() for t in tables]
    compiled = torch.compile(embedding, fullgraph=True, backend="aot_eager")
    for call in (embedding, compiled):
        out = call(tokens, *leaves)
        grads = torch.autograd.grad(out.square().sum(), leaves)
        if call is embedding:
            expected = [out, *grads]
    assert all(map(torch.equal, [out, *grads], expected))


# Wrong arguments: one clear error, from the public call and from the raw op


@pytest.mark.parametrize("bad", [10, -1, 2**40, -(2**63)])
def test_a_token_outside_the_vocabulary_is_named(bad: int) -> None:
    tokens, tables = make(3, 4, 10, 6, "cpu")
    tokens[1, 2] = bad
    for needs_grad in (False, True):
        tables[0].requires_grad_(needs_grad)
        with pytest.raises(IndexError, match=rf"tokens\[1, 2\] is {bad}, expected 0 to 9"):
            embedding(tokens, *tables)
    with pytest.raises(RuntimeError, match=rf"tokens\[6\] is {bad}, expected 0 to 9"):
        RAW_BACKWARD(torch.ones(3, 4, 6), tokens, 10, [True, True])


TOKENS, (WEIGHT, POSITIONS) = make(2, 3, 5, 4, "cpu")
GOOD = {"tokens": TOKENS, "weight": WEIGHT, "positions": POSITIONS}
WRONG = {
    "list": ({"tokens": [[1]]}, TypeError, "tokens has dtype list, expected torch.int64"),
    "int32": ({"tokens": TOKENS.int()}, TypeError, "tokens has dtype torch.int32, expected tor"),
    "rank": ({"tokens": TOKENS[0]}, ValueError, r"tokens has shape \(3,\), expected \(B, T\)"),
    "flat": ({"weight": WEIGHT[0]}, ValueError, r"weight has shape \(4,\), expected \(V, d\)"),
    "none": ({"weight": None}, TypeError, "weight is NoneType, expected a torch.Tensor"),
    "dtype": ({"weight": WEIGHT.long()}, TypeError, "weight has dtype torch.int64, expected float"),
    "mixed": ({"positions": POSITIONS.double()}, TypeError, "positions .*float64, .*float32 as we"),
    "time": ({"positions": POSITIONS[1:]}, ValueError, r"positions .*\(2, 4\), .* = \(3, 4\)"),
    "device": ({"tokens": TOKENS.to("meta")}, ValueError, "tokens is on meta, expected cpu as we"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name: str) -> None:
    change, error, message = WRONG[name]
    arguments: dict[str, Any] = {**GOOD, **change}
    with pytest.raises(error, match=message):
        embedding(**arguments)


RAW_WRONG = {
    "strided": ((TOKENS, WEIGHT.T.contiguous().T, POSITIONS), "weight has .*expected contiguous"),
    "int32": ((TOKENS.int(), WEIGHT, POSITIONS), "tokens has dtype .*Int, expected .*Long"),
    "positions": (
        (TOKENS, WEIGHT, POSITIONS[1:]),
        r"positions has shape \(2, 4\), expected \(3, 4",
    ),
    "float16": (
        (TOKENS, WEIGHT.half(), POSITIONS.half()),
        "weight has dtype float16, .* CUDA only",
    ),
}


@pytest.mark.parametrize("name", RAW_WRONG)
def test_wrong_arguments_of_the_raw_op(name: str) -> None:
    arguments, message = RAW_WRONG[name]
    with pytest.raises(RuntimeError, match=message):
        RAW_FORWARD(*arguments)
