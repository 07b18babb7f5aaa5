"""The loss over a vocabulary projection: its values, gradients, and every promise it makes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F
from compare import MODES, assert_as_good_as_torch, autocast_of
from memory import peak_growth
from torch import Tensor

from gpt_ext.ops import Norm, cross_entropy

RAW_FORWARD = torch.ops.gpt_ext.cross_entropy_forward
NAMES = ["x", "weight", "bias", "norm_weight", "norm_bias"]
SIZES = [  # rows, d, V: smaller and larger than the kernels' tiles, and not their multiples
    (1, 1, 1),
    (3, 7, 5),
    (17, 42, 104),
    (150, 65, 33),
    (65, 33, 1030),
]
IGNORED = -100


def make(
    rows: tuple[int, ...], d: int, vocabulary: int, device: str, dtype: torch.dtype = torch.float32
) -> tuple[list[Tensor], Tensor]:
    """x, weight, bias, the norm's weight and bias, and targets of which some are ignored."""
    shapes = (*rows, d), (vocabulary, d), (vocabulary,), (d,), (d,)
    inputs = [torch.randn(shape, device=device, dtype=dtype) for shape in shapes]
    inputs[1] /= d**0.5
    targets = torch.randint(max(vocabulary, 1), rows, device=device)
    return inputs, torch.where(torch.rand(rows, device=device) < 0.2, IGNORED, targets)


def ours(targets: Tensor, x: Tensor, weight: Tensor, *rest: Tensor | None) -> Tensor:
    bias, *norm = rest
    return cross_entropy(x, weight, bias, targets, norm=Norm(*norm) if norm else None)


def eager(targets: Tensor, x: Tensor, weight: Tensor, *rest: Tensor | None) -> Tensor:
    """PyTorch's own calls, the logits in float32 or float64 as torch's autocast has them."""
    bias, *norm = rest
    x = F.layer_norm(x, x.shape[-1:], *norm) if norm else x
    logits = F.linear(x, weight, bias)
    logits = logits.double() if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


def exact(targets: Tensor, x: Tensor, weight: Tensor, *rest: Tensor | None) -> Tensor:
    bias, *norm = rest
    logits = reference.linear(x, weight, bias, norm or None)
    return reference.cross_entropy(logits.flatten(0, -2), targets.cpu().flatten())


def of(function: Callable[..., Tensor], targets: Tensor) -> Callable[..., Tensor]:
    return lambda *inputs: function(targets, *inputs)


def results(inputs: list[Tensor], targets: Tensor, dloss: float = 1.0) -> list[Tensor]:
    out = ours(targets, *inputs)
    dout = torch.tensor(dloss, dtype=out.dtype, device=out.device)
    return reference.with_gradients(of(ours, targets), inputs, dout)


@pytest.mark.parametrize("with_norm", [True, False], ids=["norm", "bare"])
@pytest.mark.parametrize("mode", MODES)
def test_values_and_gradients(mode: str, with_norm: bool, backend: str) -> None:
    for rows, d, vocabulary in SIZES:
        inputs, targets = make((rows,), d, vocabulary, backend, MODES[mode])
        targets[0] = vocabulary - 1  # one counts
        if not with_norm:
            inputs = inputs[:3]
            if mode == "autocast":
                inputs[0] = inputs[0].bfloat16()  # where it comes from another product
        with autocast_of(mode, backend):
            dloss = torch.tensor(0.7, dtype=eager(targets, *inputs).dtype, device=backend)
            our = reference.with_gradients(of(ours, targets), inputs, dloss)
            torchs = reference.with_gradients(of(eager, targets), inputs, dloss)
        expected = reference.exact(of(exact, targets), inputs, dloss)
        narrow = torch.bfloat16 if mode in ("autocast", "bfloat16") else None
        assert_as_good_as_torch(["loss", *NAMES[: len(inputs)]], our, torchs, expected, narrow)


@pytest.mark.parametrize("rows", [64, 100])
@pytest.mark.parametrize("mode", MODES)
def test_the_gradient_of_a_model_that_is_all_but_sure(mode: str, rows: int, backend: str) -> None:
    inputs, _ = make((rows,), 4, 5, backend, MODES[mode])
    inputs, targets = inputs[:3], torch.zeros(rows, dtype=torch.int64, device=backend)
    inputs[0], inputs[1] = inputs[0] / 8, inputs[1] / 8
    inputs[2][0] = 6  # above the others: by 0.002 it is not sure
    with autocast_of(mode, backend):
        one = torch.ones_like(eager(targets, *inputs))
        our = reference.with_gradients(of(ours, targets), inputs, one)
        torchs = reference.with_gradients(of(eager, targets), inputs, one)
    expected = reference.exact(of(exact, targets), inputs, one)
    assert_as_good_as_torch(["loss", *NAMES[:3]], our, torchs, expected)


@pytest.mark.parametrize("mode", MODES)
def test_the_loss_is_of_the_accumulation_type(mode: str, device: str) -> None:
    inputs, targets = make((4,), 6, 9, device, MODES[mode])
    with autocast_of(mode, device):
        loss = ours(targets, *inputs)
    assert loss.shape == ()
    assert loss.dtype == (torch.float64 if mode == "float64" else torch.float32)


def test_without_a_bias(backend: str) -> None:
    (x, weight, bias, *norm), targets = make((9,), 6, 10, backend)
    expected = ours(targets, x, weight, torch.zeros_like(bias), *norm)
    torch.testing.assert_close(ours(targets, x, weight, None, *norm), expected)


def test_a_uniform_model_loses_the_logarithm_of_the_vocabulary(backend: str) -> None:
    x, weight = torch.randn(5, 6, device=backend), torch.zeros(104, 6, device=backend)
    targets = torch.arange(5, device=backend)
    expected = torch.tensor(104.0, device=backend).log()
    torch.testing.assert_close(cross_entropy(x, weight, None, targets), expected)


def test_large_logits_stay_finite(backend: str) -> None:
    inputs, targets = make((9,), 12, 40, backend)
    inputs[1] *= 1e4
    assert all(t.isfinite().all() for t in results(inputs, targets))


# What does not count


def test_ignored_rows_change_nothing(backend: str) -> None:
    inputs, targets = make((40,), 12, 30, backend)
    counted = targets != IGNORED
    alone = [inputs[0][counted], *inputs[1:]]
    loss, dx, *gradients = results(inputs, targets)
    expected_loss, expected_dx, *expected = results(alone, targets[counted])
    torch.testing.assert_close(loss, expected_loss)
    torch.testing.assert_close(dx[counted], expected_dx)
    assert torch.equal(dx[~counted], torch.zeros_like(dx[~counted]))
    for one, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_ignore_index_may_be_a_token(backend: str) -> None:
    (x, weight, bias, *_), _ = make((6,), 5, 7, backend)
    targets = torch.tensor([0, 3, 3, 6, 3, 1], device=backend)
    kept = targets != 3
    ours = cross_entropy(x, weight, bias, targets, ignore_index=np.int64(3))  # type: ignore[arg-type]
    torch.testing.assert_close(ours, cross_entropy(x[kept], weight, bias, targets[kept]))


@pytest.mark.parametrize("rows", [(5,), (0,), (2, 0)], ids=str)
def test_nothing_counts(rows: tuple[int, ...], backend: str) -> None:
    inputs, targets = make(rows, 6, 10, backend)
    loss, *gradients = results(inputs, torch.full_like(targets, IGNORED))
    assert loss.isnan()
    for gradient, tensor in zip(gradients, inputs, strict=True):
        assert torch.equal(gradient, torch.zeros_like(tensor))


@pytest.mark.parametrize("bad", [10, -1, -99, 2**40, -(2**63)])
def test_a_target_outside_the_vocabulary_is_named(bad: int) -> None:
    inputs, targets = make((3, 4), 6, 10, "cpu")
    targets[1, 2] = bad
    message = rf"targets\[1, 2\] is {bad}, expected 0 to 9 or ignore_index = -100"
    with pytest.raises(IndexError, match=message):
        ours(targets, *inputs)
    inputs[0].requires_grad_()
    with pytest.raises(IndexError, match=message):
        ours(targets, *inputs)


# Bits


def test_threads_and_repeats_change_nothing(backend: str) -> None:
    inputs, targets = make((300,), 30, 500, backend)
    every = []
    for threads in (1, 2, 3, 4, 4):
        torch.set_num_threads(threads)
        every.append(results(inputs, targets))
    for one in every[1:]:
        assert all(map(torch.equal, one, every[0]))


def test_gradients_are_proportional_to_the_losss(backend: str) -> None:
    inputs, targets = make((20,), 6, 10, backend)
    once, thrice = results(inputs, targets), results(inputs, targets, 4.0)
    for one, other in zip(once[1:], thrice[1:], strict=True):
        assert torch.equal(4 * one, other)


def test_backward_may_run_twice(backend: str) -> None:
    inputs, targets = make((20,), 6, 10, backend)
    leaves = [t.requires_grad_() for t in inputs]
    loss = ours(targets, *leaves)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(loss, leaves)))


def test_the_logits_gradient_is_the_only_array_of_its_size() -> None:
    rows, vocabulary = 1024, 20_000  # 82 MB
    inputs, targets = make((rows,), 4, vocabulary, "cpu")
    leaves = [x.requires_grad_() for x in inputs]
    ours(targets, *leaves).backward()  # the kernels' own memory is there
    loss = ours(targets, *leaves)
    assert peak_growth(loss.backward) < 20e6


def test_without_a_gradient_the_loss_is_the_same(backend: str) -> None:
    inputs, targets = make((40,), 12, 30, backend)
    with torch.no_grad():
        alone = ours(targets, *inputs)
    assert torch.equal(alone, results(inputs, targets)[0])


@pytest.mark.parametrize("wanted", range(5), ids=lambda i: NAMES[i])
def test_each_gradient_alone(wanted: int, backend: str) -> None:
    inputs, targets = make((20,), 6, 10, backend)
    every = results(inputs, targets)[1:]
    inputs[wanted].requires_grad_()
    ours(targets, *inputs).backward()
    assert torch.equal(inputs[wanted].grad, every[wanted])
    assert all(t.grad is None for i, t in enumerate(inputs) if i != wanted)


# What torch checks


@pytest.mark.parametrize("with_norm", [True, False], ids=["norm", "bare"])
def test_gradcheck(with_norm: bool, device: str) -> None:
    inputs, targets = make((5,), 3, 4, device, torch.float64)
    leaves = [t.requires_grad_() for t in (inputs if with_norm else inputs[:3])]
    assert torch.autograd.gradcheck(of(ours, targets), leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(of(ours, targets), leaves)


@pytest.mark.parametrize("want_dlogits", [True, False])
@pytest.mark.parametrize("mode", ["float32", "autocast"])
def test_opcheck(mode: str, want_dlogits: bool, device: str) -> None:
    inputs, targets = make((2, 3), 5, 9, device, MODES[mode])
    product = torch.bfloat16 if mode == "autocast" else MODES[mode]
    arguments = [*inputs, targets, 1e-5, IGNORED, product, False, want_dlogits]
    torch.library.opcheck(RAW_FORWARD, arguments)
    _, dlogits, statistics = RAW_FORWARD(*arguments)
    assert dlogits.dtype == product
    assert dlogits.shape == ((2, 3, 9) if want_dlogits else (0,))
    assert statistics.shape == (2, 2, 3)


# Wrong arguments: one clear error, from the public call and from the raw op

(X, W, B, NW, NB), TARGETS = make((4,), 3, 5, "cpu")
GOOD = {"x": X, "weight": W, "bias": B, "targets": TARGETS}

WRONG = {
    "no tensor": ({"targets": [1]}, TypeError, "targets has dtype list, expected torch.int64"),
    "int32": ({"targets": TARGETS.int()}, TypeError, "targets has dtype torch.int32, expected tor"),
    "ignored": ({"ignore_index": 1.5}, TypeError, "ignore_index is 1.5, expected an integer"),
    "targets": ({"targets": TARGETS[1:]}, ValueError, r"targets .*\(3,\), expected .* = \(4,\)"),
    "mixed": ({"bias": B.double()}, TypeError, "bias has dtype torch.float64, .*float32 as weight"),
    "weight": ({"weight": B}, ValueError, r"weight has shape \(5,\), expected \(V, d\)"),
    "x": ({"x": X[:, 1:]}, ValueError, r"x has shape \(4, 2\), expected \(..., d\) = \(4, 3\)"),
    "bias": ({"bias": NB}, ValueError, r"bias has shape \(3,\), expected \(V\) = \(5,\)"),
    "norm": ({"norm": Norm(B, NB)}, ValueError, r"norm.weight .*\(5,\), expected \(d\) = \(3,\)"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case: str) -> None:
    change, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        cross_entropy(**{**GOOD, **change})
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(error, match=message):
        cross_entropy(**{**GOOD, **change})


GOOD_RAW = [X, W, B, NW, NB, TARGETS, 1e-5, IGNORED, torch.float32, False, True]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({0: X[0, 0]}, r"x has shape \(\), expected \(..., d\)"),
        ({0: X.bfloat16()}, "x has dtype BFloat16, expected Float"),
        ({1: B}, r"w has shape \(5\), expected \(V, d\)"),
        ({1: W.mT.contiguous().mT}, "w has shape .*, expected contiguous"),
        ({2: NB}, r"b has shape \(3\), expected \(5\)"),
        ({3: None}, "norm_weight is None, norm_bias is a tensor, expected both or neither"),
        ({5: TARGETS.int()}, "targets has dtype Int, expected Long"),
        ({5: TARGETS[1:]}, r"targets has shape \(3\), expected \(4\)"),
        ({5: TARGETS[:1].expand(4)}, "targets .*expected contiguous"),
        ({5: torch.tensor([1, 2, 5, 7])}, "5"),
        ({6: float("nan")}, "norm_eps is nan, expected 0 or more"),
        ({8: torch.float64}, "product is Double, expected Float"),
    ],
)
def test_raw_forward_refuses(changes: dict[int, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        RAW_FORWARD(*(changes.get(i, argument) for i, argument in enumerate(GOOD_RAW)))
