"""Everything torch does with a function: the ops are to take part in it as torch's own do."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import reference
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.utils.checkpoint import checkpoint

from gpt_ext.ops import (
    Norm,
    _functional,
    causal_attention,
    cross_entropy,
    feed_forward,
    linear,
    packed_causal_attention,
)


@dataclasses.dataclass
class Op:
    """An op, the shapes of its inputs (the first one's first dim is a batch) and its reference."""

    call: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    shapes: list[tuple[int, ...]]
    raw_forward: str
    raw_backward: str
    autocast_dtype: torch.dtype = torch.bfloat16  # of the result

    def inputs(self, device: str, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        return [torch.randn(s, device=device, dtype=dtype, requires_grad=True) for s in self.shapes]


def gelu_network(*inputs: Tensor) -> Tensor:
    return feed_forward(*inputs, activation="gelu")


def gelu_reference(*inputs: Tensor) -> Tensor:
    return reference.feed_forward(*inputs, activation="gelu")


def block_linear(x: Tensor, w: Tensor, b: Tensor, *rest: Tensor) -> Tensor:
    norm_weight, norm_bias, residual = rest
    return linear(x, w, b, norm=Norm(norm_weight, norm_bias), residual=residual)


def linear_reference(x: Tensor, w: Tensor, b: Tensor, *rest: Tensor) -> Tensor:
    *norm, residual = rest
    return reference.linear(x, w, b, norm, residual)


def sublayer(x: Tensor, *rest: Tensor) -> Tensor:
    *weights, norm_weight, norm_bias = rest
    return feed_forward(x, *weights, activation="gelu", norm=Norm(norm_weight, norm_bias))


def sublayer_reference(x: Tensor, *rest: Tensor) -> Tensor:
    *weights, norm_weight, norm_bias = rest
    return x + gelu_reference(reference.layer_norm(x, norm_weight, norm_bias), *weights)


def targets_for(x: Tensor) -> Tensor:
    """Some target for each row."""
    rows = x.shape[:-1]
    return (torch.arange(rows.numel(), device=x.device) % 3).view(rows)


def loss(x: Tensor, w: Tensor, b: Tensor, *norm: Tensor) -> Tensor:
    """Times x, to be shaped like the other ops' results."""
    return x * cross_entropy(x, w, b, targets_for(x), norm=Norm(*norm))


def loss_reference(x: Tensor, w: Tensor, b: Tensor, *norm: Tensor) -> Tensor:
    logits = reference.linear(x, w, b, norm).flatten(0, -2)
    return x * reference.cross_entropy(logits, targets_for(x).flatten())


def packed_reference(qkv: Tensor) -> Tensor:
    return reference.attention(*qkv.unbind(2))


NETWORK = [(2, 5, 4), (6, 4), (6,), (4, 6), (4,)]
OPS = {
    "attention": Op(
        causal_attention,
        reference.attention,
        [(2, 5, 2, 4)] * 3,
        "attention_forward",
        "attention_backward",
    ),
    "packed": Op(
        packed_causal_attention,
        packed_reference,
        [(2, 5, 3, 2, 4)],
        "attention_forward",
        "attention_backward",
    ),
    "linear": Op(
        block_linear,
        linear_reference,
        [(2, 5, 4), (6, 4), (6,), (4,), (4,), (2, 5, 6)],
        "linear_forward",
        "linear_backward",
        torch.float32,
    ),
    "ffn": Op(gelu_network, gelu_reference, NETWORK, "ffn_forward", "ffn_backward"),
    "sublayer": Op(
        sublayer,
        sublayer_reference,
        [*NETWORK, (4,), (4,)],
        "ffn_forward",
        "ffn_backward",
        torch.float32,
    ),
    "cross_entropy": Op(
        loss,
        loss_reference,
        [(2, 5, 4), (6, 4), (6,), (4,), (4,)],
        "cross_entropy_forward",
        "linear_backward",
        torch.float32,
    ),
}


@pytest.fixture(params=OPS)
def op(request: pytest.FixtureRequest) -> Op:
    return OPS[request.param]


def gradients(out: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """Of the sum of squares of out."""
    return list(torch.autograd.grad(out.square().sum(), inputs))


def assert_close(ours: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other)


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


class Block(torch.nn.Module):
    """A pre-norm block, (B, T, 8) -> (B, T, 8)."""

    def __init__(self, dropout_p: float = 0.0) -> None:
        super().__init__()
        self.qkv, self.projection = torch.nn.Linear(8, 24), torch.nn.Linear(8, 8)
        self.first, self.second = torch.nn.Linear(8, 12), torch.nn.Linear(12, 8)
        self.norms = torch.nn.ModuleList(torch.nn.LayerNorm(8) for _ in range(2))
        self.dropout_p = dropout_p

    def forward(self, x: Tensor) -> Tensor:
        p, qkv, projection, first, second = (
            self.dropout_p, self.qkv, self.projection, self.first, self.second
        )  # fmt: skip
        norms = [Norm(norm.weight, norm.bias, norm.eps) for norm in self.norms]
        packed = linear(x, qkv.weight, qkv.bias, norm=norms[0]).view(*x.shape[:2], 3, 2, 4)
        heads = packed_causal_attention(packed, dropout_p=p).flatten(2)
        x = linear(heads, projection.weight, projection.bias, residual=x, dropout_p=p)
        weights = first.weight, first.bias, second.weight, second.bias
        return feed_forward(x, *weights, norm=norms[1], dropout_p=p)


def parameter_gradients(model: torch.nn.Module, x: Tensor) -> list[Tensor]:
    return gradients(model(x), list(model.parameters()))


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


# Compiler


def test_compile_calls_the_raw_ops_in_both_directions(op: Op, device: str) -> None:
    graphs: list[set[str]] = []

    def record(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable:
        graphs.append(
            {str(n.target).split(".")[1] for n in graph.graph.nodes if "." in str(n.target)}
        )
        return make_boxed_func(graph)

    inputs = op.inputs(device)
    backend = aot_autograd(fw_compiler=record, bw_compiler=record)
    compiled = torch.compile(op.call, backend=backend, fullgraph=True)
    ours = gradients(compiled(*inputs), inputs)
    assert_close(ours, gradients(op.call(*inputs), inputs))
    forward, backward = graphs
    assert op.raw_forward in forward
    assert op.raw_backward in backward
    plain = {
        "softmax",
        "_softmax",
        "_log_softmax",
        "exp",
        "bmm",
        "mm",
        "addmm",
        "native_layer_norm",
    }
    assert not plain & (forward | backward)


def test_compile_by_inductor(device: str) -> None:
    block, x = Block().to(device), torch.randn(2, 5, 8, device=device)
    compiled = torch.compile(block, fullgraph=True)
    assert_close(parameter_gradients(compiled, x), parameter_gradients(block, x))


def test_compile_where_the_gradient_is_expanded(op: Op, device: str) -> None:
    inputs = op.inputs(device)
    total = torch.compile(lambda *t: op.call(*t).sum(), backend="aot_eager", fullgraph=True)
    ours = torch.autograd.grad(total(*inputs), inputs)
    assert_close(list(ours), list(torch.autograd.grad(op.call(*inputs).sum(), inputs)))


def test_compile_with_frozen_inputs(op: Op, device: str) -> None:
    first, *frozen = op.inputs(device)
    frozen = [t.detach() for t in frozen]
    compiled = torch.compile(op.call, backend="aot_eager", fullgraph=True)
    ours = gradients(compiled(first, *frozen), [first])
    assert_close(ours, gradients(op.call(first, *frozen), [first]))


def test_compile_with_dynamic_shapes(device: str) -> None:
    block = Block().to(device)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True, dynamic=True)
    for batch, time in ((2, 5), (3, 70)):
        x = torch.randn(batch, time, 8, device=device)
        assert_close(parameter_gradients(compiled, x), parameter_gradients(block, x))


def test_compile_with_dropout_follows_the_generator(device: str) -> None:
    block, x = Block(dropout_p=0.5).to(device), torch.randn(2, 5, 8, device=device)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    torch.manual_seed(1)
    ours = parameter_gradients(compiled, x)
    torch.manual_seed(1)
    assert_close(ours, parameter_gradients(block, x))


def test_compile_of_a_transform(op: Op, device: str) -> None:
    inputs = [t.detach() for t in op.inputs(device)]
    function = grad(lambda *t: op.call(*t).square().sum())
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), function(*inputs))


def test_export(device: str) -> None:
    block, x = Block().to(device), torch.randn(2, 5, 8, device=device)
    dynamic = torch.export.Dim.DYNAMIC
    exported = torch.export.export(block, (x,), dynamic_shapes=({0: dynamic, 1: dynamic},))
    targets = {str(node.target) for node in exported.graph.nodes}
    raw = {f"gpt_ext.{op}_forward.default" for op in ("attention", "linear", "ffn")}
    assert raw <= targets
    longer = torch.randn(3, 9, 8, device=device)
    torch.testing.assert_close(exported.module()(longer), block(longer))


def test_meta_device(op: Op) -> None:
    inputs = op.inputs("meta")
    out = op.call(*inputs)
    assert out.is_meta
    assert out.shape == op.reference(*op.inputs("cpu")).shape
    assert [g.shape for g in gradients(out, inputs)] == [t.shape for t in inputs]


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
