"""The norm of gradients and AdamW's step: values, and every promise made of them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from compare import assert_as_good_as_torch
from torch import Tensor, nn

from gpt_ext import AdamW
from gpt_ext.ops import optimizer

pytestmark = pytest.mark.usefixtures("level")

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
# Nothing, a number, parts of a vector, several runs of 4,096 elements and the beginning of one.
SHAPES = [(0,), (), (1,), (7, 5), (64, 64), (3, 4097), (300, 42)]
OPTIONS: dict[str, Any] = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-5, "weight_decay": 0.3}


def tensors(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


def reference_steps(
    parameters: list[Tensor], gradients: list[list[Tensor]], scale: float = 1.0
) -> list[Tensor]:
    """Algorithm 2 of Loshchilov and Hutter (2019), in float64: parameters, then both averages."""
    (beta1, beta2), rate = OPTIONS["betas"], OPTIONS["lr"]
    theta = [p.double() for p in parameters]
    m, v = ([torch.zeros_like(p) for p in theta] for _ in range(2))
    for t, step in enumerate(gradients, start=1):
        for i, g in enumerate(step):
            g = g.double() * scale
            m[i] = beta1 * m[i] + (1 - beta1) * g
            v[i] = beta2 * v[i] + (1 - beta2) * g * g
            m_hat, v_hat = m[i] / (1 - beta1**t), v[i] / (1 - beta2**t)
            decay = OPTIONS["weight_decay"] * theta[i]
            theta[i] = theta[i] - rate * (m_hat / (v_hat.sqrt() + OPTIONS["eps"]) + decay)
    return [*theta, *m, *v]


def steps_of(
    kind: Any, parameters: list[Tensor], gradients: list[list[Tensor]], **how: Any
) -> list[Tensor]:
    """The same by an optimizer."""
    leaves = [nn.Parameter(p.clone()) for p in parameters]
    adamw = kind(leaves, **OPTIONS)
    for step in gradients:
        for leaf, gradient in zip(leaves, step, strict=True):
            leaf.grad = gradient.clone()
        adamw.step(**how)
    states = [adamw.state[leaf] for leaf in leaves]
    assert [state["step"].item() for state in states] == [len(gradients)] * len(leaves)
    moments = [state[name] for name in ("exp_avg", "exp_avg_sq") for state in states]
    return [*(leaf.detach() for leaf in leaves), *moments]


def assert_like_torch(ours: list[Tensor], torchs: list[Tensor], exact: list[Tensor]) -> None:
    """By the rule of compare.py, for all elements of all parameters, then of both averages."""
    results = [
        [
            torch.cat([x.flatten() for x in side[kind * len(SHAPES) :][: len(SHAPES)]])
            for kind in range(3)
        ]
        for side in (ours, torchs, exact)
    ]
    assert_as_good_as_torch(["parameters", "averages", "squares"], *results)


@pytest.mark.parametrize("beta1", [0.0, 0.3])
def test_a_small_gradient_after_a_large_one(beta1: float) -> None:
    averages = []
    for kind in (AdamW, torch.optim.AdamW):
        parameter = nn.Parameter(torch.zeros(19))
        adamw: Any = kind([parameter], betas=(beta1, 0.9))
        for gradient in (1e4, 1e-4):
            parameter.grad = torch.full((19,), gradient)
            adamw.step()
        averages.append(adamw.state[parameter]["exp_avg"])
    torch.testing.assert_close(*averages)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("steps", [1, 3])
def test_steps(dtype: torch.dtype, steps: int) -> None:
    parameters, gradients = tensors(dtype), [tensors(dtype, 1 + step) for step in range(steps)]
    ours = steps_of(AdamW, parameters, gradients)
    torchs = steps_of(torch.optim.AdamW, parameters, gradients)
    exact = reference_steps(parameters, gradients)
    assert_like_torch(ours, torchs, exact)
    assert not torch.equal(ours[-1], tensors(dtype)[-1])


def test_gradients_are_scaled() -> None:
    parameters, gradients = tensors(), [tensors(seed=1), tensors(seed=2)]
    ours = steps_of(AdamW, parameters, gradients, gradient_scale=0.25)
    halved = [[g * 0.25 for g in step] for step in gradients]
    torchs = steps_of(torch.optim.AdamW, parameters, halved)
    assert_like_torch(ours, torchs, reference_steps(parameters, gradients, 0.25))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm(dtype: torch.dtype) -> None:
    gradients = tensors(dtype)
    exact = math.sqrt(sum(g.double().square().sum().item() for g in gradients))
    rounding = 1e-14 if dtype == torch.float64 else 1e-6
    assert optimizer.norm(gradients) == pytest.approx(exact, rel=rounding)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_norm_of_what_is_not_finite(bad: float) -> None:
    gradients = tensors()
    gradients[-1][-1, -1] = bad
    assert not math.isfinite(optimizer.norm(gradients))


def test_threads_and_repeats_change_nothing() -> None:
    parameters, gradients = tensors(), [tensors(seed=1), tensors(seed=2)]
    every = []
    for threads in (1, 2, 3, 4, 4):
        torch.set_num_threads(threads)
        norm = torch.tensor(optimizer.norm(gradients[0]), dtype=torch.float64)
        every.append([norm, *steps_of(AdamW, parameters, gradients)])
    for one in every[1:]:
        assert all(map(torch.equal, one, every[0]))


def test_in_place_changes_are_seen_by_autograd() -> None:
    weight = nn.Parameter(torch.ones(3))
    adamw = AdamW([weight])
    loss = (weight * weight).sum()
    loss.backward(retain_graph=True)
    adamw.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_what_has_no_gradient_is_left_alone() -> None:
    with_gradient, without = (nn.Parameter(torch.ones(3)) for _ in range(2))
    adamw = AdamW([with_gradient, without])
    assert adamw.gradient_norm() == 0
    adamw.step()
    with_gradient.grad = torch.full((3,), 2.0)
    assert adamw.gradient_norm() == pytest.approx(math.sqrt(12))
    adamw.step()
    assert torch.equal(without, torch.ones(3))
    assert without not in adamw.state
    assert not torch.equal(with_gradient, torch.ones(3))


def test_gradients_may_be_strided() -> None:
    weight = nn.Parameter(torch.ones(3, 4))
    adamw = AdamW([weight])
    weight.grad = torch.arange(12.0).view(4, 3).T
    adamw.step()
    expected = (1 - 0.9) * torch.arange(12.0).view(4, 3).T
    torch.testing.assert_close(adamw.state[weight]["exp_avg"], expected)


def test_groups_have_options_of_their_own() -> None:
    first, second = (nn.Parameter(torch.ones(3)) for _ in range(2))
    adamw = AdamW([{"params": [first]}, {"params": [second], "lr": 0.5}], lr=0.25, weight_decay=0)
    for weight in (first, second):
        weight.grad = torch.ones(3)
    adamw.step()
    torch.testing.assert_close(first.detach(), torch.full((3,), 0.75))
    torch.testing.assert_close(second.detach(), torch.full((3,), 0.5))


def test_a_closure_is_called_with_gradients_on() -> None:
    weight = nn.Parameter(torch.tensor([3.0]))
    adamw = AdamW([weight], lr=0.5, weight_decay=0)

    def closure() -> float:
        adamw.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss.item()

    assert adamw.step(closure) == 9
    assert weight.item() == pytest.approx(2.5)


@pytest.mark.parametrize(
    ("before", "after"), [(AdamW, torch.optim.AdamW), (torch.optim.AdamW, AdamW)]
)
def test_the_state_goes_from_one_kind_to_the_other(before: Any, after: Any) -> None:
    weight = nn.Parameter(torch.ones(5))
    straight, stopped = (nn.Parameter(torch.ones(5)) for _ in range(2))
    gradients = [torch.arange(5.0), torch.arange(5.0).flip(0), torch.ones(5)]

    def steps(weight: nn.Parameter, adamw: torch.optim.Optimizer, gradients: list[Tensor]) -> None:
        for gradient in gradients:
            weight.grad = gradient.clone()
            adamw.step()

    steps(straight, torch.optim.AdamW([straight], **OPTIONS), gradients)
    first, second = before([stopped], **OPTIONS), after([weight], **OPTIONS)
    steps(stopped, first, gradients[:2])
    with torch.no_grad():
        weight.copy_(stopped)
    second.load_state_dict(first.state_dict())
    steps(weight, second, gradients[2:])
    torch.testing.assert_close(weight, straight)


def test_pytorchs_state_may_count_steps_in_another_dtype() -> None:
    weight = nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    before, after = torch.optim.AdamW([weight]), AdamW([weight])
    before.step()
    state = before.state_dict()
    state["state"][0]["step"] = state["state"][0]["step"].double()
    after.load_state_dict(state)
    after.step()
    assert after.state_dict()["state"][0]["step"] == 2


# Wrong arguments: one clear error, and nothing is changed


def test_other_options_of_torch_are_refused_when_loaded() -> None:
    weight = nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    adamw = AdamW([weight])
    for option in ("amsgrad", "maximize"):
        adamw.load_state_dict(torch.optim.AdamW([weight], **{option: True}).state_dict())
        with pytest.raises(ValueError, match=f"{option} is True, expected False"):
            adamw.step()
    assert torch.equal(weight, torch.ones(3))


def test_other_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="a parameter is on meta, expected cpu"):
        AdamW([nn.Parameter(torch.ones(3, device="meta"))])


ONES = [torch.ones(3), torch.ones(2, 2)]
WRONG = {
    "number": ("gradients", [torch.ones(3)], "gradients are 1 tensors, expected 2 as parameters"),
    "shape": ("gradients", [ONES[0], torch.ones(4)], r"gradients\[1\] has shape \(4\), .*\(2, 2\)"),
    "dtype": ("squares", [ONES[0].double(), ONES[1]], r"squares\[0\] has dtype Double, .* Float"),
    "strides": ("averages", [ONES[0], torch.ones(4, 2)[::2]], r"averages\[1\] .* contiguous"),
    "steps": ("steps", [torch.zeros((), dtype=torch.int64)] * 2, r"steps\[0\] has dtype Long, .*"),
    "mixed": ("parameters", [ONES[0], torch.ones(2, 2).double()], r"parameters\[1\] has dtype Dou"),
    "half": ("parameters", [x.half() for x in ONES], "parameters has dtype float16, .* CUDA only"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name: str) -> None:
    which, value, message = WRONG[name]
    arguments = {
        "parameters": [x.clone() for x in ONES],
        "gradients": ONES,
        "averages": [x.clone() for x in ONES],
        "squares": [x.clone() for x in ONES],
        "steps": [torch.zeros(()), torch.zeros(())],
    }
    before = {key: [x.clone() for x in group] for key, group in arguments.items()}
    with pytest.raises(RuntimeError, match=message):
        optimizer.adamw_(
            **(arguments | {which: value}),
            learning_rate=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0,
        )  # fmt: skip
    for key, group in arguments.items():
        assert all(map(torch.equal, group, before[key])), key


def test_gradients_of_several_dtypes_have_no_norm() -> None:
    with pytest.raises(RuntimeError, match=r"gradients\[1\] has dtype Double, expected Float"):
        optimizer.norm([torch.ones(3), torch.ones(3).double()])
