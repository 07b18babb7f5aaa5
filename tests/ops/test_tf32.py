"""float32 on CUDA in tf32: where torch takes its own products so, by its setting at each call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from every_op import Op, gradients
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

MATMUL = torch.backends.cuda.matmul


def set_precision(precision: str) -> None:
    torch.set_float32_matmul_precision(precision)


def set_allow_tf32(allow: bool) -> None:
    MATMUL.allow_tf32 = allow


def set_fp32_precision(precision: str) -> None:
    MATMUL.fp32_precision = precision


# The ways that torch has of saying it: each with what allows tf32 and what does not.
SETTINGS: dict[str, tuple[Callable[[Any], None], Any, Any]] = {
    "set_float32_matmul_precision": (set_precision, "high", "highest"),
    "allow_tf32": (set_allow_tf32, True, False),
    "fp32_precision": (set_fp32_precision, "tf32", "ieee"),
}


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    yield
    set_precision("highest")
    set_fp32_precision("none")


class Allowed(TorchDispatchMode):
    """What the raw ops called inside are told."""

    def __init__(self) -> None:
        super().__init__()
        self.told: dict[str, bool] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "gpt_ext":
            names = [argument.name for argument in func._schema.arguments]
            self.told[func._opname] = args[names.index("allow_tf32")]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("setting", SETTINGS)
def test_each_call_reads_the_setting_and_its_backward_takes_the_same(op: Op, setting: str) -> None:
    change, on, off = SETTINGS[setting]
    inputs = op.inputs("cpu", torch.float32)
    with Allowed() as mode:
        out = op.call(*inputs)
        assert mode.told == {op.raw_forward: False}
        for value, other, expected in ((on, off, True), (off, on, False)):
            change(value)
            out = op.call(*inputs)
            change(other)
            gradients(out, inputs)
            assert mode.told == {op.raw_forward: expected, op.raw_backward: expected}
    change(on)
    with Allowed() as mode, torch.no_grad():
        op.call(*inputs)
    assert mode.told == {op.raw_forward: True}


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_compiled_call_reads_it_too(op: Op, setting: str) -> None:
    change, on, off = SETTINGS[setting]
    told: list[Any] = []

    def record(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable:
        for node in graph.graph.nodes:
            if getattr(node.target, "namespace", "") == "gpt_ext":
                names = [argument.name for argument in node.target._schema.arguments]
                told.append(node.args[names.index("allow_tf32")])
        return graph.forward

    inputs = [t.detach() for t in op.inputs("cpu", torch.float32)]
    compiled = torch.compile(op.call, backend=record, fullgraph=True)
    for value in (off, on, off):
        change(value)
        compiled(*inputs)
    assert told == [False, True]


def test_a_cpu_ignores_it(op: Op) -> None:
    inputs = op.inputs("cpu", torch.float32)

    def run() -> list[Tensor]:
        out = op.call(*inputs)
        return [out, *gradients(out, inputs)]

    expected = run()
    set_allow_tf32(True)
    assert all(map(torch.equal, run(), expected))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernels need a CUDA device")
def test_on_cuda_the_error_is_as_torchs_own(op: Op) -> None:
    inputs = op.inputs("cuda", torch.float32)
    doubles = [t.detach().double().requires_grad_() for t in inputs]

    def run(call: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
        out = call(*inputs)
        return [out, *gradients(out, inputs)]

    exact, full = run(op.reference, doubles), run(op.call, inputs)
    set_allow_tf32(True)
    ours, theirs = run(op.call, inputs), run(op.reference, inputs)
    assert not torch.equal(ours[0], full[0])
    for e, one, other in zip(exact, ours, theirs, strict=True):
        # Rounding the products' operands alone came to 13 at most, in 300 draws of the inputs.
        floor = 16 * 2**-11 * e.abs().max()
        assert (one - e).abs().max() <= 2 * (other - e).abs().max() + floor
