"""The CPU engine's packs: no change of a weight goes unnoticed, and what did not change is kept."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from spread import SIZES, START, new_model
from torch import Tensor, nn

from gpt_ext import GPT, engine
from gpt_ext.ops import decode

FORMS = decode.FORMATS


@pytest.fixture
def model() -> GPT:
    return new_model()


def greedy(model: GPT, **options: Any) -> Tensor:
    return model.generate(START, 30, temperature=0, **options)


# Each changes the last block's weights in its own way, as users do.
def step_of_the_optimizer(model: GPT) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.3)
    model.loss(torch.randint(40, (2, 9)), torch.randint(40, (2, 9))).backward()
    optimizer.step()


def step_of_a_fused_optimizer(model: GPT) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.3, fused=True)
    model.loss(torch.randint(40, (2, 9)), torch.randint(40, (2, 9))).backward()
    optimizer.step()


def load(model: GPT) -> None:
    model.load_state_dict(new_model().state_dict())


def load_by_assignment(model: GPT) -> None:
    model.load_state_dict(new_model().state_dict(), assign=True)


def edit_data(model: GPT) -> None:
    model.vocab_projection.weight.data.neg_()


def edit_one_number_through_data(model: GPT) -> None:
    model.vocab_projection.bias.data[int(greedy(model)[0, 5])] -= 100


def edit_in_numpy(model: GPT) -> None:
    model.vocab_projection.weight.detach().numpy()[:] *= -1


def replace_data(model: GPT) -> None:
    model.position_embedding.weight.data = torch.randn(32, 48)


def edit_under_no_grad(model: GPT) -> None:
    with torch.no_grad():
        model.blocks[-1].feed_forward.down.weight.mul_(-3)


def replace_a_parameter(model: GPT) -> None:
    model.token_embedding.weight = nn.Parameter(torch.randn(40, 48))


def replace_a_module(model: GPT) -> None:
    model.vocab_projection = nn.Linear(48, 40)


def change_eps(model: GPT) -> None:
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 10.0


CHANGES = [
    step_of_the_optimizer, step_of_a_fused_optimizer, load, load_by_assignment, edit_data,
    edit_one_number_through_data, edit_in_numpy, replace_data, edit_under_no_grad,
    replace_a_parameter, replace_a_module, change_eps,
]  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_no_change_of_the_weights_goes_unnoticed(
    model: GPT, change: Callable[[GPT], None], form: decode.WeightFormat
) -> None:
    before = greedy(model, dtype=form)
    change(model)
    after = greedy(model, dtype=form)
    fresh = GPT(**SIZES)
    fresh.load_state_dict(model.state_dict())
    for module, other in zip(fresh.modules(), model.modules(), strict=True):
        if isinstance(module, nn.LayerNorm):
            module.eps = other.eps
    assert torch.equal(after, greedy(fresh, dtype=form))
    assert not torch.equal(after, before), "the change was to change the text"


def test_a_copy_has_weights_of_its_own(model: GPT) -> None:
    before = greedy(model)
    twin = copy.deepcopy(model)
    assert torch.equal(greedy(twin), before)
    edit_data(twin)
    assert not torch.equal(greedy(twin), before)
    assert torch.equal(greedy(model), before)


def test_weights_that_did_not_change_are_packed_once(
    model: GPT, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = engine.engine_for(model, "int8")
    monkeypatch.setattr(decode, "pack", lambda *_: pytest.fail("packed again"))
    assert engine.engine_for(model, "int8") is first


def test_a_stream_goes_on_with_the_weights_it_began_with(model: GPT) -> None:
    expected = greedy(model)[0, 1:]
    tokens = model.stream(START, 30, temperature=0)
    first = next(tokens)
    edit_data(model)
    assert torch.equal(torch.cat([first, *tokens]), expected)
