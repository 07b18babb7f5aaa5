"""The linear layer in every form: its values, its gradients, and every promise of its contract."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
from compare import MODES, assert_as_good_as_torch, autocast_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gpt_ext.ops import Norm, linear

RAW_FORWARD = torch.ops.gpt_ext.linear_forward
RAW_BACKWARD = torch.ops.gpt_ext.linear_backward

FORMS = {  # what is there besides x and the weight; "dropout" stands for p = 0.3
    "bare": set(),
    "queries, keys, values": {"norm"},
    "projection": {"bias", "residual", "dropout"},
    "vocabulary": {"norm", "bias"},
    "everything": {"norm", "bias", "residual", "dropout"},
}
SIZES = [  # rows, d, o: smaller and larger than the kernels' tiles, and not their multiples
    (1, 1, 1),
    (3, 7, 5),
    (17, 42, 126),
    (70, 130, 33),
    (129, 65, 257),
    (20, 130, 1100),  # weights larger than x, in several panels and blocks of sums
    (2501, 10, 14),  # more rows than a CPU's backward takes at a time
]
P = 0.3


def make(
    rows: tuple[int, ...], d: int, o: int, form: set[str], device: str, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The tensors of a form, with outputs of the order of 1."""
    sizes = {
        "x": (*rows, d),
        "weight": (o, d),
        **({"bias": (o,)} if "bias" in form else {}),
        **({"norm_weight": (d,), "norm_bias": (d,)} if "norm" in form else {}),
        **({"residual": (*rows, o)} if "residual" in form else {}),
    }
    inputs = {name: torch.randn(size, device=device, dtype=dtype) for name, size in sizes.items()}
    inputs["weight"] /= max(d, 1) ** 0.5
    if "norm" in form:
        inputs["x"] = 3 * inputs["x"] + 1
    return inputs


def ours(dropout_p: float = 0.0, **t: Tensor) -> Tensor:
    norm = Norm(t["norm_weight"], t["norm_bias"]) if "norm_weight" in t else None
    torch.manual_seed(7)
    return linear(
        t["x"], t["weight"], t.get("bias"),
        norm=norm, residual=t.get("residual"), dropout_p=dropout_p,
    )  # fmt: skip


def eager(factor: Tensor | None, **t: Tensor) -> Tensor:
    """PyTorch's own calls."""
    x = t["x"]
    if "norm_weight" in t:
        x = F.layer_norm(x, x.shape[-1:], t["norm_weight"], t["norm_bias"])
    z = F.linear(x, t["weight"], t.get("bias"))
    z = z if factor is None else z * factor.to(z)
    return t["residual"] + z if "residual" in t else z


def exact(factor: Tensor | None, **t: Tensor) -> Tensor:
    norm = (t["norm_weight"], t["norm_bias"]) if "norm_weight" in t else None
    return reference.linear(t["x"], t["weight"], t.get("bias"), norm, t.get("residual"), factor)


def by_name(function: Callable[..., Tensor], names: list[str], *first: Any) -> Callable:
    return lambda *tensors: function(*first, **dict(zip(names, tensors, strict=True)))


def drawn_factor(form: set[str], rows: int, columns: int, device: str) -> Tensor | None:
    """What dropout multiplies by where the generator starts from `ours`'s seed."""
    if "dropout" not in form:
        return None
    torch.manual_seed(7)
    seed = torch.randint(2**63 - 1, (1,), device=device).item()
    return reference.residual_keep_mask(seed, P, rows, columns).double() / (1 - P)


def results(inputs: dict[str, Tensor], dout: Tensor, form: set[str]) -> list[Tensor]:
    p = P if "dropout" in form else 0.0
    return reference.with_gradients(by_name(ours, list(inputs), p), list(inputs.values()), dout)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mode", MODES)
def test_values_and_gradients(mode: str, form: str, backend: str) -> None:
    parts = FORMS[form]
    for rows, d, o in SIZES:
        inputs = make((rows,), d, o, parts, backend, MODES[mode])
        names = list(inputs)
        if mode == "autocast" and "norm" not in parts:
            inputs["x"] = inputs["x"].bfloat16()  # where it comes from another product
        factor = drawn_factor(parts, rows, o, backend)
        with autocast_of(mode, backend):
            out = eager(factor, **inputs)
            dout = torch.randn_like(out)
            our = results(inputs, dout, parts)
            torchs = reference.with_gradients(
                by_name(eager, names, factor), list(inputs.values()), dout
            )
        expected = reference.exact(by_name(exact, names, factor), list(inputs.values()), dout)
        product = torch.bfloat16 if mode == "autocast" else None
        assert_as_good_as_torch(["out", *names], our, torchs, expected, product)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
def test_dropout_keeps_what_the_mask_says(p: float, backend: str) -> None:
    rows, columns = 37, 70
    x, weight = torch.zeros(rows, 3, device=backend), torch.zeros(columns, 3, device=backend)
    bias = torch.ones(columns, device=backend, requires_grad=True)
    out = ours(p, x=x, weight=weight, bias=bias)
    torch.manual_seed(7)
    seed = torch.randint(2**63 - 1, (1,), device=backend).item()
    keep = reference.residual_keep_mask(seed, p, rows, columns).to(backend)
    factor = keep.float() / (1 - p) if p < 1 else torch.zeros(rows, columns, device=backend)
    torch.testing.assert_close(out.detach(), factor)
    out.sum().backward()
    torch.testing.assert_close(bias.grad, factor.sum(0))


def test_all_dropped_leaves_the_residual(backend: str) -> None:
    inputs = make((9,), 6, 10, FORMS["everything"], backend, torch.float32)
    assert torch.equal(ours(1.0, **inputs), inputs["residual"])


def test_the_residuals_gradient_is_the_outputs(backend: str) -> None:
    inputs = make((2, 9), 6, 10, FORMS["everything"], backend, torch.float32)
    inputs["residual"].requires_grad_()
    dout = torch.randn(2, 9, 10, device=backend)
    ours(P, **inputs).backward(dout)
    assert torch.equal(inputs["residual"].grad, dout)


def test_transforms_draw_the_same_mask() -> None:
    inputs = make((2, 9), 6, 10, FORMS["everything"], "cpu", torch.float64)
    x = inputs.pop("x")
    out, _ = torch.func.jvp(lambda x: ours(P, x=x, **inputs), (x,), (x,))
    torch.testing.assert_close(out, ours(P, x=x, **inputs))


def test_a_norm_of_equal_elements_is_its_bias(backend: str) -> None:
    inputs = make((4,), 6, 3, FORMS["vocabulary"], backend, torch.float32)
    inputs["x"] = torch.full((4, 6), 5.0, device=backend)
    expected = F.linear(inputs["norm_bias"], inputs["weight"], inputs["bias"]).expand(4, 3)
    torch.testing.assert_close(ours(**inputs), expected)


def test_a_norm_far_from_zero_keeps_its_digits(backend: str) -> None:
    inputs = make((40,), 60, 8, FORMS["vocabulary"], backend, torch.float32)
    inputs["x"] = torch.randn(40, 60, device=backend) + 1000
    doubles = {name: t.double() for name, t in inputs.items()}
    torch.testing.assert_close(
        ours(**inputs).double(), exact(None, **doubles), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("value", [3.3, 1000.1])
@pytest.mark.parametrize("d", [33, 252, 768])
def test_a_norm_of_equal_numbers_is_zero(value: float, d: int, backend: str) -> None:
    x, weight = torch.full((2, d), value, device=backend), torch.eye(d, device=backend)
    norm = Norm(torch.ones(d, device=backend), torch.zeros(d, device=backend))
    torch.testing.assert_close(linear(x, weight, norm=norm), torch.zeros_like(x))


@pytest.mark.parametrize("eps", [0.0, 1e-5, 0.5])
def test_eps_is_the_norms(eps: float, backend: str) -> None:
    x, weight = torch.randn(5, 12, device=backend), torch.eye(12, device=backend)
    norm = Norm(torch.rand(12, device=backend), torch.rand(12, device=backend), eps)
    expected = reference.layer_norm(x.double(), norm.weight.double(), norm.bias.double(), eps)
    torch.testing.assert_close(
        linear(x, weight, norm=norm).double(), expected, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (2, 1, 3)], ids=str)
def test_leading_dims(leading: tuple[int, ...], backend: str) -> None:
    form = FORMS["everything"]
    inputs = make(leading, 6, 10, form, backend, torch.float32)
    dout = torch.randn(*leading, 10, device=backend)
    flat = {name: t.reshape(-1, t.shape[-1]) if name in ("x", "residual") else t
            for name, t in inputs.items()}  # fmt: skip
    one, other = results(inputs, dout, form), results(flat, dout.reshape(-1, 10), form)
    assert one[0].shape == (*leading, 10)
    assert one[1].shape == (*leading, 6)
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a.reshape(b.shape), b)


def test_strides_change_nothing(device: str) -> None:
    form = FORMS["everything"]
    inputs = make((9,), 6, 10, form, device, torch.float32)
    dout = torch.randn(10, 9, device=device).mT
    strided = {name: t.mT.contiguous().mT if t.dim() == 2 else t[:1].expand_as(t)
               for name, t in inputs.items()}  # fmt: skip
    contiguous = {name: t.contiguous() for name, t in strided.items()}
    one, other = results(strided, dout, form), results(contiguous, dout.contiguous(), form)
    assert all(map(torch.equal, one, other))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows", [(0,), (2, 0, 3)], ids=str)
def test_no_rows(rows: tuple[int, ...], form: str, backend: str) -> None:
    inputs = make(rows, 6, 10, FORMS[form], backend, torch.float32)
    out, *gradients = results(inputs, torch.empty(*rows, 10, device=backend), FORMS[form])
    assert out.shape == (*rows, 10)
    for name, gradient in zip(inputs, gradients, strict=True):
        assert torch.equal(gradient, torch.zeros_like(inputs[name]))


def test_nothing_to_sum_over(backend: str) -> None:
    inputs = make((4,), 0, 10, FORMS["projection"], backend, torch.float32)
    dout = torch.randn(4, 10, device=backend)
    out, _, _, dbias, _ = results(inputs, dout, {"bias", "residual"})
    torch.testing.assert_close(out, inputs["residual"] + inputs["bias"])
    torch.testing.assert_close(dbias, dout.sum(0))


@pytest.mark.parametrize("form", ["vocabulary", "projection"])
def test_no_outputs(form: str, backend: str) -> None:
    inputs = make((4,), 6, 0, FORMS[form], backend, torch.float32)
    out, dx, *_ = results(inputs, torch.empty(4, 0, device=backend), FORMS[form])
    assert out.shape == (4, 0)
    assert torch.equal(dx, torch.zeros_like(dx))


@pytest.mark.parametrize("mode", ["float32", "autocast"])
def test_threads_and_repeats_change_nothing(mode: str, backend: str) -> None:
    form = FORMS["everything"]
    inputs = make((131,), 60, 250, form, backend, MODES[mode])
    dout = torch.randn(131, 250, device=backend)
    every = []
    with autocast_of(mode, backend):
        for threads in (1, 2, 3, 4, 4):
            torch.set_num_threads(threads)
            every.append(results(inputs, dout, form))
    for one in every[1:]:
        assert all(map(torch.equal, one, every[0]))


@pytest.mark.parametrize("wanted", range(6))
def test_each_gradient_alone(wanted: int, backend: str) -> None:
    form = FORMS["everything"]
    inputs = make((20,), 6, 10, form, backend, torch.float32)
    dout = torch.randn(20, 10, device=backend)
    every = results(inputs, dout, form)[1:]
    name = list(inputs)[wanted]
    inputs[name].requires_grad_()
    ours(P, **inputs).backward(dout)
    assert torch.equal(inputs[name].grad, every[wanted])
    assert all(t.grad is None for other, t in inputs.items() if other != name)


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form: str, device: str) -> None:
    inputs = make((2,), 3, 2, FORMS[form], device, torch.float64)
    function = by_name(ours, list(inputs), P if "dropout" in FORMS[form] else 0.0)
    leaves = [t.requires_grad_() for t in inputs.values()]
    assert torch.autograd.gradcheck(function, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, leaves)


def raw_arguments(form: set[str], mode: str, device: str) -> list[Any]:
    """Of the raw forward op."""
    t = make((2, 3), 5, 9, form, device, MODES[mode])
    product = torch.bfloat16 if mode == "autocast" else MODES[mode]
    x = t["x"] if "norm" in form else t["x"].to(product)
    p, seed = (P, torch.tensor([5], device=device)) if "dropout" in form else (0.0, None)
    norm = t.get("norm_weight"), t.get("norm_bias")
    rest = 1e-5, p, seed, product, False
    return [x, t["weight"], t.get("bias"), *norm, t.get("residual"), *rest]


@pytest.mark.parametrize("mode", ["float32", "autocast"])
@pytest.mark.parametrize("form", FORMS)
def test_opcheck(form: str, mode: str, device: str) -> None:
    arguments = raw_arguments(FORMS[form], mode, device)
    x, w, _, norm_weight, norm_bias, residual, _, p, seed, product, _ = arguments
    torch.library.opcheck(RAW_FORWARD, arguments)
    out, statistics = RAW_FORWARD(*arguments)
    has_norm, has_residual = norm_weight is not None, residual is not None
    assert out.dtype == (w.dtype if has_residual else product)
    assert statistics.shape == ((2, 2, 3) if has_norm else (0,))
    for wanted in ([True] * 3 + [has_norm] * 2, [False, True, False, False, has_norm]):
        torch.library.opcheck(
            RAW_BACKWARD,
            (torch.randn_like(out), x, w, norm_weight, norm_bias, statistics, has_residual, p,
             seed, product, False, wanted),
        )  # fmt: skip


# Autocast


class Calls(TorchDispatchMode):
    """Records the ops that are called, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[str, tuple]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.made.append((str(func), args))
        return func(*args, **(kwargs or {}))


def test_autocast_copies_neither_parameters_nor_the_stream() -> None:
    t = make((4,), 6, 10, FORMS["everything"], "cpu", torch.float32)
    with torch.autocast("cpu", torch.bfloat16), Calls() as calls:
        out = ours(**t)
    assert out.dtype == torch.float32
    assert [name for name, _ in calls.made] == ["gpt_ext.linear_forward.default"]
    passed = calls.made[0][1]
    order = t["x"], t["weight"], t["bias"], t["norm_weight"], t["norm_bias"], t["residual"]
    assert all(
        one.data_ptr() == other.data_ptr() for one, other in zip(passed[:6], order, strict=True)
    )
    assert passed[-2] == torch.bfloat16


def test_autocast_gives_products_dtype_without_a_residual(device: str) -> None:
    t = make((4,), 6, 10, FORMS["vocabulary"], device, torch.float32)
    with torch.autocast(device, torch.bfloat16):
        assert ours(**t).dtype == torch.bfloat16
        assert ours(**{**t, "x": t["x"].bfloat16()}).dtype == torch.bfloat16
        doubles = {name: value.double() for name, value in t.items()}
        assert ours(**doubles).dtype == torch.float64
        with pytest.raises(
            TypeError, match=r"bias has dtype torch.float64, expected torch.float32"
        ):
            ours(**{**t, "bias": t["bias"].double()})
