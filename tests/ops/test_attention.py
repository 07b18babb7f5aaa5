"""Causal attention: its values, its gradients, and every promise of its contract."""

from __future__ import annotations

import pytest
import reference
import torch
import torch.nn.functional as F
from compare import assert_as_good_as_torch
from memory import peak_growth
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gpt_ext.ops import causal_attention, packed_causal_attention

RAW_FORWARD = torch.ops.gpt_ext.attention_forward
RAW_BACKWARD = torch.ops.gpt_ext.attention_backward

TIMES = [1, 2, 17, 31, 33, 64, 128, 192, 193, 400]  # the CPU's blocks are of 192, CUDA's of 64
HEAD_DIMS = [1, 7, 8, 42, 64, 80, 128, 200, 256]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
if torch.cuda.is_available():
    DTYPES.append(torch.float16)


def packed(
    batch: int, time: int, heads: int, dim: int, device: str, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, ...]:
    """q, k, v as views of one (B, T, 3, H, D) tensor."""
    return torch.randn(batch, time, 3, heads, dim, device=device, dtype=dtype).unbind(2)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's own causal attention for (B, T, H, D)."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def results(inputs: tuple[Tensor, ...], dout: Tensor) -> list[Tensor]:
    return reference.with_gradients(causal_attention, inputs, dout)


def assert_right(inputs: tuple[Tensor, ...]) -> None:
    """Output and gradients obey the tolerance rule for a random gradient of the output."""
    dout = torch.randn_like(inputs[0])
    ours = results(inputs, dout)
    torchs = reference.with_gradients(sdpa, inputs, dout)
    exact = reference.exact(reference.attention, inputs, dout)
    assert_as_good_as_torch(["out", "dq", "dk", "dv"], ours, torchs, exact)


def skip_half_on_cpu(dtype: torch.dtype, device: str) -> None:
    if dtype == torch.float16 and device == "cpu":
        pytest.skip("float16 is for CUDA only")


@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("time", TIMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(dtype: torch.dtype, time: int, dim: int, backend: str) -> None:
    skip_half_on_cpu(dtype, backend)
    assert_right(packed(2, time, 2, dim, backend, dtype))


@pytest.mark.parametrize("scale", [0.0, 1.0, -0.3])
def test_scale(scale: float, backend: str) -> None:
    q, k, v = packed(2, 40, 2, 16, backend, torch.float64)
    expected = reference.attention(q.cpu(), k.cpu(), v.cpu(), scale)
    torch.testing.assert_close(causal_attention(q, k, v, scale=scale).cpu(), expected)


def test_large_scores_do_not_overflow(backend: str) -> None:
    q, k, v = packed(1, 70, 2, 32, backend)
    assert_right((q * 100, k * 100, v))


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FC00001, -1], ids=hex)
def test_nan_of_any_bits_is_not_lost(bits: int, backend: str) -> None:
    q, k, v = (t.contiguous().requires_grad_() for t in packed(1, 6, 1, 8, backend))
    with torch.no_grad():
        k[0, 2, 0, 0] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    out = causal_attention(q, k, v)
    (dq,) = torch.autograd.grad(out.sum(), q)
    assert out[0, :2].isfinite().all(), "of what comes before the NaN"
    assert out[0, 2:].isnan().all()
    assert dq[0, 2:].isnan().all()


def test_lse(backend: str) -> None:
    q, k, v = packed(2, 70, 3, 42, backend, torch.float64)
    _, lse = RAW_FORWARD(q, k, v, 0.2, 0.0, None, False)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * 0.2
    future = torch.ones(70, 70, dtype=torch.bool, device=backend).triu(1)
    torch.testing.assert_close(lse, scores.masked_fill(future, -torch.inf).logsumexp(-1))


class RecordedOps(TorchDispatchMode):
    """The names of the ops called inside, on real tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_packed_views_are_read_in_place(device: str) -> None:
    q, k, v = packed(2, 9, 3, 8, device)
    with RecordedOps() as ops:
        out = causal_attention(q, k, v)
    assert ops.names == ["gpt_ext::attention_forward"]
    assert torch.equal(out, causal_attention(q.contiguous(), k.contiguous(), v.contiguous()))
    assert out.is_contiguous()


@pytest.mark.parametrize("shape", [(2, 70, 3, 42), (1, 1, 1, 1), (0, 5, 2, 8)], ids=str)
@pytest.mark.parametrize("options", [{}, {"scale": 0.7, "dropout_p": 0.3}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_is_the_same_attention(
    dtype: torch.dtype, options: dict, shape: tuple[int, ...], backend: str
) -> None:
    skip_half_on_cpu(dtype, backend)
    inputs = packed(*shape, backend, dtype)
    dout = torch.randn(shape, device=backend, dtype=dtype)
    separate = reference.with_gradients(checked(seed=3, **options), inputs, dout)
    one = checked(packed_causal_attention, seed=3, **options)
    out, dqkv = reference.with_gradients(one, [torch.stack(inputs, 2)], dout)
    for ours, other in zip((out, *dqkv.unbind(2)), separate, strict=True):
        assert torch.equal(ours, other)
    assert dqkv.is_contiguous()


def test_the_packed_tensor_is_copied_neither_way(device: str) -> None:
    qkv = torch.randn(2, 9, 3, 3, 8, device=device, requires_grad=True)
    with RecordedOps() as ops:
        out = packed_causal_attention(qkv)
        torch.autograd.grad(out, qkv, torch.ones_like(out))
    ops.names.remove("aten::ones_like")
    views = {"aten::unbind.int", "aten::detach"}
    expected = ["gpt_ext::attention_forward", "gpt_ext::attention_backward"]
    assert [name for name in ops.names if name not in views] == expected


STRIDED = {
    "heads first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "time first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "every other step": lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
    "inside a wider row": lambda x: F.pad(x, (3, 5))[..., 3:-5],
    "last dim strided": lambda x: x.mT.contiguous().mT,
    "one batch expanded": lambda x: x[:1].expand_as(x),
    "one head expanded": lambda x: x[:, :, :1].expand_as(x),
    "one number expanded": lambda x: x[:1, :1, :1, :1].expand_as(x),
}


@pytest.mark.parametrize("layout", STRIDED)
def test_strides_change_nothing(layout: str, backend: str) -> None:
    q, k, v, dout = (STRIDED[layout](t) for t in torch.randn(4, 2, 33, 3, 10, device=backend))
    strided = results((q, k, v), dout)
    contiguous = results((q.contiguous(), k.contiguous(), v.contiguous()), dout.contiguous())
    for one, other in zip(strided, contiguous, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("shape", [(0, 5, 2, 8), (2, 0, 2, 8), (2, 5, 0, 8)], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_empty(shape: tuple[int, ...], dropout_p: float, backend: str) -> None:
    q = torch.empty(shape, device=backend, requires_grad=True)
    out = causal_attention(q, q, q, dropout_p=dropout_p)
    out.sum().backward()
    assert out.shape == q.grad.shape == shape


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("now", [1, 30, 64, 100])
def test_the_future_changes_nothing_before_it(now: int, dtype: torch.dtype, backend: str) -> None:
    skip_half_on_cpu(dtype, backend)
    inputs = packed(2, 129, 2, 24, backend, dtype)
    dout = torch.randn(2, 129, 2, 24, device=backend, dtype=dtype)
    dout[:, now:] = 0
    before = results(inputs, dout)
    changed = tuple(torch.cat([t[:, :now], 50 * torch.randn_like(t[:, now:])], 1) for t in inputs)
    after = results(changed, dout)
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one[:, :now], other[:, :now])
    for gradient in after[1:]:
        assert torch.equal(gradient[:, now:], torch.zeros_like(gradient[:, now:]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 300, 1, 42), (3, 129, 3, 64), (5, 450, 2, 8)], ids=str)
def test_threads_change_nothing(shape: tuple[int, ...], dtype: torch.dtype, backend: str) -> None:
    inputs = packed(*shape, backend, dtype)
    dout = torch.randn(shape, device=backend, dtype=dtype)
    every = []
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        every.append(results(inputs, dout))
    for one in every[1:]:
        assert all(map(torch.equal, one, every[0]))


def test_repeats_are_equal_bit_for_bit(backend: str) -> None:
    inputs = packed(3, 200, 2, 42, backend)
    dout = torch.randn(3, 200, 2, 42, device=backend)
    first = results(inputs, dout)
    for _ in range(3):
        assert all(map(torch.equal, results(inputs, dout), first))


def test_memory_grows_with_time_not_with_its_square() -> None:
    time = 8192
    qkv = torch.randn(1, time, 3, 1, 8, requires_grad=True)
    dout = torch.randn(1, time, 1, 8)
    for dtype in (torch.float32, torch.bfloat16):
        x, g = qkv.to(dtype), dout.to(dtype)
        grown = peak_growth(lambda x=x, g=g: torch.autograd.grad(packed_causal_attention(x), x, g))
        assert grown < time * time / 4, "bytes; a matrix of bfloat16 scores has eight times as many"


def test_unneeded_gradients_are_none(device: str) -> None:
    q, k, v = packed(1, 5, 2, 4, device)
    k.requires_grad_()
    causal_attention(q, k, v).sum().backward()
    assert k.grad is not None
    assert q.grad is None
    assert v.grad is None


# Dropout


def test_dropout_values_and_gradients(backend: str) -> None:
    p, seed = 0.3, 11
    q, k, v = packed(2, 34, 2, 16, backend, torch.float64)
    dout = torch.randn_like(q)
    seed_tensor = torch.tensor([seed], device=backend)
    out, lse = RAW_FORWARD(q, k, v, 0.25, p, seed_tensor, False)
    grads = RAW_BACKWARD(dout, q, k, v, out, lse, 0.25, p, seed_tensor, False).unbind(2)
    factor = reference.attention_keep_mask(seed, p, 2, 2, 34).double() / (1 - p)
    exact = reference.exact(
        lambda *t: reference.attention(*t, scale=0.25, factor=factor), (q, k, v), dout
    )
    for ours, right in zip((out, *grads), exact, strict=True):
        torch.testing.assert_close(ours.cpu(), right, rtol=1e-12, atol=1e-12)


def test_dropout_statistics(device: str) -> None:
    batch, time, heads, p = 4, 64, 4, 0.2
    ones = torch.ones(batch, time, heads, time, device=device)
    v = torch.eye(time, device=device)[None, :, None].expand_as(ones)
    out = causal_attention(ones, ones, v, dropout_p=p).transpose(1, 2)  # (B, H, T, T)
    past = torch.ones(time, time, dtype=torch.bool, device=device).tril()
    kept = (out[..., past] != 0).double()
    deviation = (p * (1 - p) / kept.numel()) ** 0.5
    assert abs(kept.mean().item() - (1 - p)) < 4 * deviation
    expected = 1 / torch.arange(1, time + 1, device=device) / (1 - p)  # 1/(i+1), scaled
    rows = torch.where(out != 0, expected[:, None].float(), 0.0)
    torch.testing.assert_close(out, rows)


def test_dropout_follows_the_generator(device: str) -> None:
    q, k, v = packed(2, 20, 2, 8, device)
    torch.manual_seed(5)
    first, second = (causal_attention(q, k, v, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(5)
    assert torch.equal(first, causal_attention(q, k, v, dropout_p=0.5))
    assert not torch.equal(first, second)


def test_no_dropout_draws_nothing(device: str) -> None:
    q, k, v = packed(1, 5, 1, 4, device)
    expected = torch.Generator().manual_seed(0).get_state()
    torch.manual_seed(0)
    causal_attention(q, k, v)
    assert torch.equal(torch.get_rng_state(), expected)


def test_dropout_of_everything(backend: str) -> None:
    inputs = packed(2, 20, 2, 8, backend)
    dout = torch.randn(2, 20, 2, 8, device=backend)
    everything = reference.with_gradients(
        lambda *t: causal_attention(*t, dropout_p=1.0), inputs, dout
    )
    for tensor in everything:
        assert torch.equal(tensor, torch.zeros_like(tensor))


# Gradients of the gradients


def checked(attention=causal_attention, *, seed: int | None = None, **options):
    """The function as comparisons need it: the same dropout mask at every call."""

    def function(*inputs: Tensor) -> Tensor:
        if seed is not None:
            torch.manual_seed(seed)
        return attention(*inputs, **options)

    return function


@pytest.mark.parametrize("options", [{}, {"scale": 0.7}, {"dropout_p": 0.4, "seed": 3}], ids=str)
def test_gradcheck(options: dict, device: str) -> None:
    inputs = tuple(t.requires_grad_() for t in packed(1, 3, 2, 2, device, torch.float64))
    function = checked(**options)
    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, inputs)
    function = checked(packed_causal_attention, **options)
    qkv = torch.stack([t.detach() for t in inputs], 2).requires_grad_()
    assert torch.autograd.gradcheck(function, qkv, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, qkv)


def test_gradcheck_of_one_tensor_in_three_places(device: str) -> None:
    x = torch.randn(1, 3, 1, 2, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: causal_attention(x, x, x), x)
    assert torch.autograd.gradgradcheck(lambda x: causal_attention(x, x, x), x)


# The raw ops


@pytest.mark.parametrize("layout", ["packed", "heads first", "inside a wider row"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_opcheck(layout: str, dropout_p: float, device: str) -> None:
    q, k, v = packed(2, 9, 3, 8, device)
    dout = torch.randn_like(q)
    if layout != "packed":
        q, k, v, dout = (STRIDED[layout](t) for t in (q, k, v, dout))
    seed = torch.tensor([7], device=device) if dropout_p else None
    options = 0.3, dropout_p, seed, False
    torch.library.opcheck(RAW_FORWARD, (q, k, v, *options))
    out, lse = RAW_FORWARD(q, k, v, *options)
    torch.library.opcheck(RAW_BACKWARD, (dout, q, k, v, out, lse, *options))
