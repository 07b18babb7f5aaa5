"""The feed-forward network: its values, its gradients, and every promise of its contract."""

from __future__ import annotations

import pytest
import reference
import torch
import torch.nn.functional as F
from compare import MODES, assert_as_good_as_torch, autocast_of
from torch import Tensor

from gpt_ext.ops import Norm, feed_forward

RAW_FORWARD = torch.ops.gpt_ext.ffn_forward
RAW_BACKWARD = torch.ops.gpt_ext.ffn_backward

ACTIVATIONS = ["relu", "gelu", "gelu_tanh"]
GRADIENTS = ["dx", "dw1", "db1", "dw2", "db2"]
SIZES = [  # rows, d, h: smaller and larger than the kernels' tiles, and not their multiples
    (1, 1, 1),
    (2, 7, 5),
    (3, 8, 33),
    (17, 42, 168),
    (33, 64, 256),
    (65, 100, 31),
    (128, 252, 1008),
    (257, 17, 129),
    (2501, 10, 14),  # more rows than a CPU takes at a time
]


def make(
    rows: tuple[int, ...], d: int, h: int, device: str, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, ...]:
    """x, w1, b1, w2, b2 with outputs of the order of 1."""
    options = {"device": device, "dtype": dtype}
    return (
        torch.randn(*rows, d, **options),
        torch.randn(h, d, **options) / max(d, 1) ** 0.5,
        torch.randn(h, **options),
        torch.randn(d, h, **options) / max(h, 1) ** 0.5,
        torch.randn(d, **options),
    )


def far_from_zero(b1: Tensor) -> Tensor:
    """A bias by which no z is so near to zero that roundings change its sign."""
    return b1 + 16 * b1.sign()


def eager(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, activation: str) -> Tensor:
    """PyTorch's own three calls."""
    z = F.linear(x, w1, b1)
    if activation == "relu":
        return F.linear(F.relu(z), w2, b2)
    return F.linear(F.gelu(z, approximate="tanh" if activation == "gelu_tanh" else "none"), w2, b2)


def results(inputs: tuple[Tensor, ...], dout: Tensor, activation: str) -> list[Tensor]:
    return reference.with_gradients(
        lambda *t: feed_forward(*t, activation=activation), inputs, dout
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("mode", [*MODES, "float16"])
def test_values_and_gradients(mode: str, activation: str, backend: str) -> None:
    if mode == "float16" and backend != "cuda":
        pytest.skip("float16 is for CUDA only")
    for rows, d, h in SIZES:
        x, w1, b1, *rest = make((rows,), d, h, backend, MODES.get(mode, torch.float16))
        if mode == "autocast":
            x = x.bfloat16()  # where it comes from another product
        inputs = x, w1, far_from_zero(b1) if activation == "relu" else b1, *rest
        with autocast_of(mode, backend):
            dout = torch.randn_like(eager(*inputs, activation))
            ours = results(inputs, dout, activation)
            torchs = reference.with_gradients(lambda *t: eager(*t, activation), inputs, dout)
        exact = reference.exact(lambda *t: reference.feed_forward(*t, activation), inputs, dout)
        product = torch.bfloat16 if mode == "autocast" else None
        assert_as_good_as_torch(["out", *GRADIENTS], ours, torchs, exact, product)


# With a norm: the sub-layer of a pre-norm block


def make_sublayer(
    rows: tuple[int, ...], d: int, h: int, device: str, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, ...]:
    """x, w1, b1, w2, b2 and the norm's weight and bias."""
    x, *weights = make(rows, d, h, device, dtype)
    norm = (torch.randn(d, device=device, dtype=dtype) for _ in range(2))
    return 3 * x + 1, *weights, *norm


def sublayer(*inputs: Tensor, activation: str = "gelu", dropout_p: float = 0.0) -> Tensor:
    *inputs, weight, bias = inputs
    torch.manual_seed(7)
    norm = Norm(weight, bias)
    return feed_forward(*inputs, activation=activation, norm=norm, dropout_p=dropout_p)


def sublayer_results(
    inputs: tuple[Tensor, ...], dout: Tensor, activation: str = "gelu", dropout_p: float = 0.0
) -> list[Tensor]:
    return reference.with_gradients(
        lambda *t: sublayer(*t, activation=activation, dropout_p=dropout_p), inputs, dout
    )


def drawn_factor(p: float, rows: int, columns: int, device: str) -> Tensor:
    """What dropout multiplies by where the generator starts from `sublayer`'s seed."""
    torch.manual_seed(7)
    seed = torch.randint(2**63 - 1, (1,), device=device).item()
    keep = reference.residual_keep_mask(seed, p, rows, columns).to(device)
    return keep.double() / (1 - p) if p < 1 else keep.double()


@pytest.mark.parametrize(("activation", "p"), [("relu", 0.3), ("gelu", 0.0), ("gelu_tanh", 0.3)])
@pytest.mark.parametrize("mode", MODES)
def test_sublayer(mode: str, activation: str, p: float, backend: str) -> None:
    for rows, d, h in SIZES:
        x, w1, b1, *others = make_sublayer((rows,), d, h, backend, MODES[mode])
        inputs = x, w1, far_from_zero(b1) if activation == "relu" else b1, *others
        factor = drawn_factor(p, rows, d, backend)

        def eager_sublayer(x: Tensor, *rest: Tensor, factor: Tensor = factor) -> Tensor:
            *weights, weight, bias = rest
            out = eager(F.layer_norm(x, x.shape[-1:], weight, bias), *weights, activation)
            return x + out * factor.to(out.dtype)

        def exact_sublayer(x: Tensor, *rest: Tensor, factor: Tensor = factor) -> Tensor:
            *weights, weight, bias = rest
            normed = reference.layer_norm(x, weight, bias)
            return x + reference.feed_forward(normed, *weights, activation) * factor.cpu()

        dout = torch.randn_like(inputs[0])
        with autocast_of(mode, backend):
            ours = sublayer_results(inputs, dout, activation, p)
            torchs = reference.with_gradients(eager_sublayer, inputs, dout)
        exact = reference.exact(exact_sublayer, inputs, dout)
        product = torch.bfloat16 if mode == "autocast" else None
        names = ["out", *GRADIENTS, "dnorm_weight", "dnorm_bias"]
        assert_as_good_as_torch(names, ours, torchs, exact, product)


def test_sublayer_with_all_dropped_is_x(backend: str) -> None:
    inputs = make_sublayer((9,), 6, 10, backend)
    dout = torch.randn_like(inputs[0])
    out, dx, *gradients = sublayer_results(inputs, dout, dropout_p=1.0)
    assert torch.equal(out, inputs[0])
    assert torch.equal(dx, dout)
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients)


@pytest.mark.parametrize("rows", [(0,), (2, 0, 3)], ids=str)
def test_sublayer_of_no_rows(rows: tuple[int, ...], backend: str) -> None:
    inputs = make_sublayer(rows, 6, 10, backend)
    out, *gradients = sublayer_results(inputs, torch.empty_like(inputs[0]))
    assert out.shape == (*rows, 6)
    for gradient, tensor in zip(gradients, inputs, strict=True):
        assert torch.equal(gradient, torch.zeros_like(tensor))


@pytest.mark.parametrize("mode", ["float32", "autocast"])
def test_sublayer_by_threads_and_repeats(mode: str, backend: str) -> None:
    inputs = make_sublayer((131,), 60, 250, backend)
    dout = torch.randn_like(inputs[0])
    every = []
    with autocast_of(mode, backend):
        for threads in (1, 2, 3, 4, 4):
            torch.set_num_threads(threads)
            every.append(sublayer_results(inputs, dout, dropout_p=0.3))
    for one in every[1:]:
        assert all(map(torch.equal, one, every[0]))


@pytest.mark.parametrize("wanted", range(7))
def test_each_gradient_of_the_sublayer_alone(wanted: int, backend: str) -> None:
    inputs = make_sublayer((20,), 6, 10, backend)
    dout = torch.randn_like(inputs[0])
    every = sublayer_results(inputs, dout, dropout_p=0.3)[1:]
    inputs[wanted].requires_grad_()
    sublayer(*inputs, dropout_p=0.3).backward(dout)
    assert torch.equal(inputs[wanted].grad, every[wanted])
    assert all(t.grad is None for i, t in enumerate(inputs) if i != wanted)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck_of_the_sublayer(activation: str, device: str) -> None:
    inputs = tuple(t.requires_grad_() for t in make_sublayer((2,), 3, 3, device, torch.float64))

    def function(*inputs: Tensor) -> Tensor:
        return sublayer(*inputs, activation=activation, dropout_p=0.3)

    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_autocast_keeps_the_stream(device: str) -> None:
    inputs = make_sublayer((4,), 6, 10, device)
    with torch.autocast(device, torch.bfloat16):
        assert sublayer(*inputs).dtype == torch.float32
        assert feed_forward(*inputs[:5]).dtype == torch.bfloat16


# Without a norm


def test_relu_is_the_default(device: str) -> None:
    inputs = make((3,), 4, 8, device)
    assert torch.equal(feed_forward(*inputs), feed_forward(*inputs, activation="relu"))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_large_inputs_stay_finite(activation: str, backend: str) -> None:
    x, *weights = make((9,), 12, 40, backend)
    inputs = (x * 1e4, *weights)
    for tensor in results(inputs, torch.ones_like(x), activation):
        assert tensor.isfinite().all()


@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (2, 1, 3)], ids=str)
def test_leading_dims(leading: tuple[int, ...], backend: str) -> None:
    inputs = make(leading, 6, 10, backend)
    flat = (inputs[0].reshape(-1, 6), *inputs[1:])
    dout = torch.randn(*leading, 6, device=backend)
    ours = results(inputs, dout, "gelu")
    flats = results(flat, dout.reshape(-1, 6), "gelu")
    assert ours[0].shape == ours[1].shape == (*leading, 6)
    for one, other in zip(ours, flats, strict=True):
        assert torch.equal(one.reshape(other.shape), other)


STRIDED = {
    "transposed": lambda x: x.mT.contiguous().mT,
    "inside wider rows": lambda x: F.pad(x, (3, 5))[..., 3:-5],
    "expanded": lambda x: x[:1].expand_as(x),
    "one number expanded": lambda x: x[:1, :1].expand_as(x),
}


@pytest.mark.parametrize("layout", STRIDED)
def test_strides_change_nothing(layout: str, device: str) -> None:
    x, w1, b1, w2, b2 = make((9,), 6, 10, device)
    change = STRIDED[layout]
    inputs = change(x), change(w1), b1[:1].expand_as(b1), change(w2), b2[:1].expand_as(b2)
    dout = change(torch.randn_like(x))
    strided = results(inputs, dout, "gelu")
    contiguous = results(tuple(t.contiguous() for t in inputs), dout.contiguous(), "gelu")
    for one, other in zip(strided, contiguous, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("rows", [(0,), (2, 0, 3)], ids=str)
def test_no_rows(rows: tuple[int, ...], activation: str, backend: str) -> None:
    inputs = make(rows, 6, 10, backend)
    out, dx, *weights = results(inputs, torch.empty(*rows, 6, device=backend), activation)
    assert out.shape == dx.shape == (*rows, 6)
    for gradient in weights:  # a sum over no rows
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_no_hidden_units(activation: str, backend: str) -> None:
    inputs = make((4,), 6, 0, backend)
    dout = torch.randn(4, 6, device=backend)
    out, dx, _, _, _, db2 = results(inputs, dout, activation)
    assert torch.equal(out, inputs[4].expand(4, 6))
    assert torch.equal(dx, torch.zeros_like(dx))
    torch.testing.assert_close(db2, dout.sum(0))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_change_nothing(dtype: torch.dtype, activation: str, backend: str) -> None:
    inputs = make((131,), 60, 250, backend, dtype)
    dout = torch.randn_like(inputs[0])
    every = []
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        every.append(results(inputs, dout, activation))
    for one in every[1:]:
        assert all(map(torch.equal, one, every[0]))


def test_repeats_are_equal_bit_for_bit(backend: str) -> None:
    inputs = make((200,), 60, 250, backend)
    dout = torch.randn_like(inputs[0])
    first = results(inputs, dout, "gelu")
    for _ in range(3):
        assert all(map(torch.equal, results(inputs, dout, "gelu"), first))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("wanted", range(5), ids=lambda i: GRADIENTS[i])
def test_each_gradient_alone(wanted: int, activation: str, backend: str) -> None:
    inputs = make((20,), 6, 10, backend)
    dout = torch.randn_like(inputs[0])
    every = results(inputs, dout, activation)[1:]
    inputs[wanted].requires_grad_()
    feed_forward(*inputs, activation=activation).backward(dout)
    assert torch.equal(inputs[wanted].grad, every[wanted])
    assert all(t.grad is None for i, t in enumerate(inputs) if i != wanted)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation: str, device: str) -> None:
    inputs = tuple(t.requires_grad_() for t in make((2,), 2, 3, device, torch.float64))

    def function(*inputs: Tensor) -> Tensor:
        return feed_forward(*inputs, activation=activation)

    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("activation", range(3), ids=lambda i: ACTIVATIONS[i])
@pytest.mark.parametrize("form", ["bare", "sublayer", "autocast"])
def test_opcheck(form: str, activation: int, device: str) -> None:
    *inputs, weight, bias = make_sublayer((2, 3), 5, 9, device)
    x, w1, _, w2, _ = inputs
    has_norm = form != "bare"
    norm = (weight, bias) if has_norm else (None, None)
    dropout = (0.3, torch.tensor([5], device=device)) if has_norm else (0.0, None)
    product = torch.bfloat16 if form == "autocast" else torch.float32
    arguments = (*inputs, *norm, 1e-5, activation, *dropout, product, False)
    torch.library.opcheck(RAW_FORWARD, arguments)
    out, saved, statistics = RAW_FORWARD(*arguments)
    assert saved.dtype == product
    assert statistics.shape == ((2, 2, 3) if has_norm else (0,))
    for wanted in ([True] * 5 + [has_norm] * 2, [False, True, False, True, False, False, has_norm]):
        dout = torch.randn_like(out)
        backward = (dout, x, w1, w2, saved, *norm, statistics, activation, *dropout, False, wanted)
        torch.library.opcheck(RAW_BACKWARD, backward)
