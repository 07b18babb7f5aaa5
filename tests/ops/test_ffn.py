"""The feed-forward network: its values, its gradients, and every promise of its contract."""

from __future__ import annotations

import pytest
import reference
import torch
import torch.nn.functional as F
from compare import assert_as_good_as_torch
from torch import Tensor

from gpt_ext.ops import feed_forward

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
]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
if torch.cuda.is_available():
    DTYPES.append(torch.float16)


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


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(
    dtype: torch.dtype, activation: str, size: tuple[int, int, int], backend: str
) -> None:
    if dtype == torch.float16 and backend == "cpu":
        pytest.skip("float16 is for CUDA only")
    rows, d, h = size
    inputs = make((rows,), d, h, backend, dtype)
    dout = torch.randn_like(inputs[0])
    ours = results(inputs, dout, activation)
    torchs = reference.with_gradients(lambda *t: eager(*t, activation), inputs, dout)
    exact = reference.exact(lambda *t: reference.feed_forward(*t, activation), inputs, dout)
    assert_as_good_as_torch(["out", *GRADIENTS], ours, torchs, exact)


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
@pytest.mark.parametrize("wanted", [[True] * 5, [False, True, False, True, False]], ids=str)
def test_opcheck(wanted: list[bool], activation: int, device: str) -> None:
    inputs = make((2, 3), 5, 9, device)
    x, w1, _, w2, _ = inputs
    torch.library.opcheck(RAW_FORWARD, (*inputs, activation))
    out, saved = RAW_FORWARD(*inputs, activation)
    dout = torch.randn_like(out)
    torch.library.opcheck(RAW_BACKWARD, (dout, x, w1, w2, saved, activation, wanted))


# Wrong arguments: one clear error, from the public call and from the raw ops

X, W1, B1, W2, B2 = INPUTS = make((4,), 3, 5, "cpu")


def replaced(**changes: Tensor) -> tuple[Tensor, ...]:
    return tuple({"x": X, "w1": W1, "b1": B1, "w2": W2, "b2": B2, **changes}.values())


WRONG = {
    "no tensor": (replaced(b1=None), TypeError, "b1 is NoneType, expected a torch.Tensor"),
    "integers": ([t.int() for t in INPUTS], TypeError, "x has dtype torch.int32, expected float64"),
    "half on CPU": ([t.half() for t in INPUTS], TypeError, "x has dtype torch.float16, .*CUDA"),
    "mixed": (replaced(x=X.bfloat16()), TypeError, "w1 has dtype torch.float32, .*bfloat16 as x"),
    "device": (replaced(w2=W2.to("meta")), ValueError, "w2 is on meta, expected cpu as x"),
    "x scalar": (replaced(x=X[0, 0]), ValueError, r"x has shape \(\), expected \(..., d\)"),
    "w1's rank": (replaced(w1=B1), ValueError, r"w1 has shape \(5,\), expected \(h, d\)"),
    "w1's d": (replaced(w1=W1[:, 1:]), ValueError, r"w1 .*\(5, 2\), expected \(h, d\) = \(5, 3\)"),
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


WRONG_RAW = {
    "integers": ([t.int() for t in INPUTS], 0, "x has dtype Int, expected float64"),
    "half on CPU": ([t.half() for t in INPUTS], 0, "x has dtype float16, which is for CUDA only"),
    "mixed dtypes": (replaced(b1=B1.double()), 0, "b1 has dtype Double, expected Float"),
    "x scalar": (replaced(x=X[0, 0]), 0, r"x has shape \(\), expected \(..., d\)"),
    "w1's rank": (replaced(w1=B1), 0, r"w1 has shape \(5\), expected \(h, d\)"),
    "w1's shape": (replaced(w1=W2), 0, r"w1 has shape \(3, 5\), expected \(3, 3\)"),
    "w2's shape": (replaced(w2=W1), 0, r"w2 has shape \(5, 3\), expected \(3, 5\)"),
    "b1's shape": (replaced(b1=B2), 0, r"b1 has shape \(3\), expected \(5\)"),
    "b2's shape": (replaced(b2=B1), 0, r"b2 has shape \(5\), expected \(3\)"),
    "strided x": (replaced(x=X.mT.contiguous().mT), 0, "x has shape .*, expected contiguous"),
    "strided w1": (replaced(w1=W1.mT.contiguous().mT), 0, "w1 has shape .*, expected contiguous"),
    "activation": (INPUTS, 3, r"activation is 3, expected 0 \(relu\), 1 \(gelu\) or 2"),
}


@pytest.mark.parametrize("case", WRONG_RAW)
def test_raw_forward_refuses(case: str) -> None:
    inputs, activation, message = WRONG_RAW[case]
    with pytest.raises(RuntimeError, match=message):
        RAW_FORWARD(*inputs, activation)


SAVED = torch.zeros(4, 5)
ALL = [True] * 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X.double(), X, W1, W2, SAVED, 0, ALL), "dout has dtype Double, expected Float"),
        ((X[1:], X, W1, W2, SAVED, 0, ALL), r"dout has shape \(3, 3\), expected \(4, 3\)"),
        ((X[:1].expand(4, 3), X, W1, W2, SAVED, 0, ALL), r"dout .* strides \(0, 1\), expected con"),
        ((X, X.long(), W1, W2, SAVED, 0, ALL), "x has dtype Long, expected float64"),
        ((X, X, W1[:, 1:], W2, SAVED, 0, ALL), r"w1 has shape \(5, 2\), expected \(5, 3\)"),
        ((X, X, W1, W2[1:], SAVED, 0, ALL), r"w2 has shape \(2, 5\), expected \(3, 5\)"),
        ((X, X, W1, W2, SAVED.double(), 0, ALL), "saved has dtype Double, expected Float"),
        ((X, X, W1, W2, SAVED[1:], 0, ALL), r"saved has shape \(3, 5\), expected \(4, 5\)"),
        ((X, X, W1, W2, SAVED, -1, ALL), "activation is -1, expected 0"),
        ((X, X, W1, W2, SAVED, 0, ALL[1:]), "wanted has 4 flags, expected 5"),
    ],
)
def test_raw_backward_refuses(arguments: tuple, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        RAW_BACKWARD(*arguments)
