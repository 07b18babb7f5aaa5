"""Everything torch does with a function: the ops are to take part in it as torch's own do."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from every_op import OPS, Block, Op, assert_close, gradients, parameter_gradients
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.utils.checkpoint import checkpoint

from gpt_ext.ops import _functional, causal_attention, feed_forward

# The three ways in


def test_torch_still_has_the_private_names() -> None:
    seen = []

    def look(x: Tensor) -> Tensor:
        seen.append(_functional.transforms_active())
        return x.sum()

    x = torch.ones(2)
    look(x)
    vmap(look)(x)
    grad(look)(x)
    with forward_ad.dual_level():
        look(x)
    look(x)
    assert seen == [False, True, True, True, False]


def test_inputs_without_gradient_make_no_graph(op: Op, device: str) -> None:
    inputs = op.inputs(device)
    assert op.call(*inputs).grad_fn is not None
    assert op.call(*(t.detach() for t in inputs)).grad_fn is None
    with torch.no_grad():
        assert op.call(*inputs).grad_fn is None
    with torch.inference_mode():
        out = op.call(*inputs)
    assert out.is_inference()
    torch.testing.assert_close(out.clone(), op.call(*inputs).detach())


def test_inputs_are_left_as_they_were(op: Op, device: str) -> None:
    inputs = op.inputs(device)
    before = [t.detach().clone() for t in inputs]
    versions = [t._version for t in inputs]
    gradients(op.call(*inputs), inputs)
    assert all(map(torch.equal, inputs, before))
    assert [t._version for t in inputs] == versions


class NoGradient(torch.autograd.Function):
    """Passes a tensor on and gives no gradient back."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> None:
        return None


def test_no_gradient_in_gives_none_out(op: Op, device: str) -> None:
    inputs = op.inputs(device)
    NoGradient.apply(op.call(*inputs)).sum().backward()
    assert all(t.grad is None for t in inputs)


def test_double_backward(op: Op, device: str) -> None:
    inputs = op.inputs(device)

    def penalty(function: Callable[..., Tensor]) -> list[Tensor]:
        first = torch.autograd.grad(function(*inputs).square().sum(), inputs, create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), inputs))

    assert_close(penalty(op.call), penalty(op.reference))


def test_batched_gradients(op: Op, device: str) -> None:
    inputs = op.inputs(device)
    out = op.call(*inputs)
    douts = torch.randn(3, *out.shape, device=device, dtype=out.dtype)
    batched = torch.autograd.grad(out, inputs, douts, is_grads_batched=True, retain_graph=True)
    for i, dout in enumerate(douts):
        one = torch.autograd.grad(out, inputs, dout, retain_graph=True)
        assert_close([g[i] for g in batched], list(one))


# torch.func


def test_vmap(op: Op, device: str) -> None:
    inputs = [torch.stack([t, 2 * t, -t]) for t in op.inputs(device)]
    expected = torch.stack([op.call(*(t[i] for t in inputs)) for i in range(3)])
    torch.testing.assert_close(vmap(op.call)(*inputs), expected)


def test_vmap_with_dropout_draws_a_mask_each(device: str) -> None:
    x = torch.ones(3, 1, 20, 1, 2, device=device)
    out = vmap(lambda x: causal_attention(x, x, x, dropout_p=0.5), randomness="different")(x)
    assert not torch.equal(out[0], out[1])
    out = vmap(lambda x: causal_attention(x, x, x, dropout_p=0.5), randomness="same")(x)
    assert torch.equal(out[0], out[1])


@pytest.mark.parametrize("transform", [jacrev, jacfwd, hessian], ids=lambda f: f.__name__)
def test_derivatives(transform: Callable, op: Op, device: str) -> None:
    inputs = [t.detach() for t in op.inputs(device)]

    def of(function: Callable[..., Tensor]) -> Tensor:
        return transform(lambda x: function(x, *inputs[1:]).sin().sum((0, 1)))(inputs[0][:, :2])

    inputs = [t[:, :2] if t.shape[:2] == (2, 5) else t for t in inputs]
    torch.testing.assert_close(of(op.call), of(op.reference))


def test_jvp(op: Op, device: str) -> None:
    inputs = tuple(t.detach() for t in op.inputs(device))
    tangents = tuple(map(torch.randn_like, inputs))
    assert_close(list(jvp(op.call, inputs, tangents)), list(jvp(op.reference, inputs, tangents)))


def test_per_sample_gradients(device: str) -> None:
    block, x = Block().to(device), torch.randn(3, 5, 8, device=device)
    parameters = {name: p.detach() for name, p in block.named_parameters()}

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return functional_call(block, parameters, (sample[None],)).square().sum()

    ours = vmap(grad(loss), (None, 0))(parameters, x)
    for i in range(3):
        assert_close([g[i] for g in ours.values()], parameter_gradients(block, x[i : i + 1]))


# Autocast


def test_autocast(op: Op, device: str) -> None:
    inputs = op.inputs(device, torch.float32)
    with torch.autocast(device, dtype=torch.bfloat16):
        out = op.call(*inputs)
    assert out.dtype == op.autocast_dtype
    ours = gradients(out, inputs)
    assert all(g.dtype == torch.float32 for g in ours)
    expected = op.call(*inputs)
    torch.testing.assert_close(out.float(), expected, rtol=0.02, atol=0.05)
    for one, other in zip(ours, gradients(expected, inputs), strict=True):
        assert (one - other).norm() < 0.03 * other.norm()


def test_autocast_takes_mixed_dtypes_and_leaves_float64(device: str) -> None:
    x, *weights = OPS["ffn"].inputs(device, torch.float32)
    with pytest.raises(TypeError, match=r"x has dtype torch\.bfloat16, expected torch\.float32"):
        feed_forward(x.bfloat16(), *weights)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert feed_forward(x.bfloat16(), *weights).dtype == torch.bfloat16
        doubles = [t.double() for t in (x, *weights)]
        assert feed_forward(*doubles).dtype == torch.float64


def test_autocast_under_transforms(op: Op, device: str) -> None:
    inputs = [t.detach() for t in op.inputs(device, torch.float32)]
    with torch.autocast(device, dtype=torch.bfloat16):
        transformed, _ = jvp(op.call, tuple(inputs), tuple(inputs))
        assert transformed.dtype == op.autocast_dtype
        torch.testing.assert_close(transformed, op.call(*inputs), rtol=0.02, atol=0.05)


# Training at large


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_recomputes_the_same_dropout(reentrant: bool, device: str) -> None:
    block = Block(dropout_p=0.5).to(device)
    x = torch.randn(2, 20, 8, device=device, requires_grad=True)

    def run(model: Callable[[Tensor], Tensor]) -> list[Tensor]:
        torch.manual_seed(3)
        model(x).square().sum().backward()
        leaves = [x, *block.parameters()]
        result = [t.grad for t in leaves]
        for t in leaves:
            t.grad = None
        return result

    ours = run(lambda x: checkpoint(block, x, use_reentrant=reentrant))
    assert all(map(torch.equal, ours, run(block)))


def mean_gradients(rank: int) -> list[Tensor]:
    """Of two processes, each with one sample."""
    torch.manual_seed(0)
    block, x = Block(), torch.randn(2, 5, 8)
    parallel = torch.nn.parallel.DistributedDataParallel(block)
    parallel(x[rank : rank + 1]).square().sum().backward()
    return [p.grad for p in block.parameters()]


def train_one_step(rank: int, folder: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    gradients = mean_gradients(rank)
    if rank == 0:
        torch.save(gradients, f"{folder}/gradients.pt")
    dist.barrier()
    # Not destroy_process_group: torch 2.13 then joins gloo's thread while it holds the GIL, for
    # which that thread may be waiting.
    os._exit(0)


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch is built without gloo")
def test_distributed_data_parallel(tmp_path: Path) -> None:
    mp.spawn(train_one_step, (str(tmp_path),), nprocs=2)
    torch.manual_seed(0)
    block, x = Block(), torch.randn(2, 5, 8)
    expected = [g / 2 for g in parameter_gradients(block, x)]
    assert_close(torch.load(tmp_path / "gradients.pt"), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device")
def test_cuda_graph(op: Op) -> None:
    inputs = op.inputs("cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        gradients(op.call(*inputs), inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients(op.call(*inputs), inputs)
    with torch.no_grad():
        for t in inputs:
            t.mul_(0.5)
    graph.replay()
    assert_close(captured, gradients(op.call(*inputs), inputs))


def test_calls_from_many_threads(op: Op, device: str) -> None:
    inputs = op.inputs(device)
    expected = gradients(op.call(*inputs), inputs)
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(lambda: gradients(op.call(*inputs), inputs)) for _ in range(40)]
        assert all(all(map(torch.equal, job.result(), expected)) for job in jobs)
