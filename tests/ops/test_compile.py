"""The ops under torch.compile, torch.export and on the meta device, as torch's own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from every_op import Block, Op, assert_close, gradients, parameter_gradients
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.func import grad


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
    # Not dynamic, as the sizes of one op after another would be: torch 2.11 fails of itself then.
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=False)
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
