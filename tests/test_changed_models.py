"""Models that were changed after they were built: text is by what they compute now."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from spread import START, new_model
from torch import Tensor, nn

from gpt_ext import GPT, engine


@pytest.fixture
def model() -> GPT:
    return new_model()


# Each makes a model that the engine does not know, or only seems to.
def hook_a_block(model: GPT) -> None:
    model.blocks[0].register_forward_hook(lambda *arguments: arguments[-1] / 2)


def hook_a_norm(model: GPT) -> None:
    model.final_norm.register_forward_hook(lambda *_: torch.ones(1, 48))


def another_class_of_block(model: GPT) -> None:
    class Louder(type(model.blocks[1])):  # type: ignore[misc]
        def forward(self, *arguments: Any) -> Tensor:
            louder: Tensor = 3 * super().forward(*arguments)
            return louder

    model.blocks[1].__class__ = Louder


def another_class_of_linear_layer(model: GPT) -> None:
    class Silent(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return torch.zeros(*x.shape[:-1], self.out_features)

    model.vocab_projection.__class__ = Silent


def another_activation(model: GPT) -> None:
    for block in model.blocks:
        block.feed_forward.activation = "gelu"


def fewer_heads(model: GPT) -> None:
    for block in model.blocks:
        block.attention.packed_shape = (3, 2, 24)


def fewer_blocks(model: GPT) -> None:
    del model.blocks[1]


def a_wider_network(model: GPT) -> None:
    network = model.blocks[0].feed_forward
    network.up, network.down = nn.Linear(48, 100), nn.Linear(100, 48)


def weight_norm(model: GPT) -> None:
    layer = nn.utils.parametrizations.weight_norm(model.vocab_projection)
    layer.parametrizations.weight.original0.data.mul_(-2)


def no_bias(model: GPT) -> None:
    model.vocab_projection.bias = None


def logits_of_its_own(model: GPT) -> None:
    logits = model.logits
    model.logits = lambda x: logits(x).roll(1, -1)  # type: ignore[method-assign]


TO_THE_ENGINE_THE_SAME = [hook_a_norm, another_class_of_linear_layer, weight_norm, no_bias]
TO_PYTORCH_ALONE = [
    hook_a_block, another_class_of_block, another_activation, fewer_heads, fewer_blocks,
    a_wider_network, logits_of_its_own,
]  # fmt: skip


@pytest.mark.parametrize(
    "change", TO_THE_ENGINE_THE_SAME + TO_PYTORCH_ALONE, ids=lambda change: change.__name__
)
def test_a_changed_model_writes_what_its_forward_says(
    model: GPT, change: Callable[[GPT], None]
) -> None:
    change(model)
    text = START
    with torch.no_grad():
        for _ in range(60):
            text = torch.cat((text, model(text[:, -32:])[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(model.generate(START, 60, temperature=0), text)
    if change in TO_PYTORCH_ALONE:
        with pytest.raises(engine.NotPlainError):
            engine.weights_of(model)


def test_norms_that_forward_refuses_write_nothing(model: GPT) -> None:
    for norm in (nn.RMSNorm(48, eps=1e-5), nn.LayerNorm(48, bias=False), nn.Identity()):
        model.final_norm = norm  # type: ignore[assignment]
        refusals = []
        for call in (lambda: model(START), lambda: model.generate(START, 5)):
            with pytest.raises((AttributeError, TypeError)) as refusal:
                call()
            refusals.append(str(refusal.value))
        assert refusals[0] == refusals[1]


def test_what_is_done_to_a_token_changes_no_later_one(model: GPT) -> None:
    hook_a_block(model)
    text = model.generate(START, 20, temperature=0)[0, 1:]
    for token, expected in zip(model.stream(START, 20, temperature=0), text, strict=True):
        assert token.item() == expected
        token.zero_()


def test_threads_keep_dropout_off_for_each_other() -> None:
    model = GPT(vocab_size=40, context_length=32, model_dim=48, num_blocks=2, num_heads=4)
    inside, gates = ([threading.Event() for _ in range(2)] for _ in range(2))

    def wait(*_: Any) -> None:
        i = int(threading.current_thread().name)
        inside[i].set()
        gates[i].wait(30)

    model.blocks[0].register_forward_hook(wait)
    threads = [
        threading.Thread(target=model.generate, args=(START, 1), name=str(i)) for i in range(2)
    ]
    for thread, entered in zip(threads, inside, strict=True):
        thread.start()
        assert entered.wait(30)
    for i, training in enumerate([False, True]):  # the first one leaves, then the last
        gates[i].set()
        threads[i].join()
        assert {module.training for module in model.modules()} == {training}


@pytest.mark.parametrize("layer", ["up", "down"])
def test_what_forward_refuses_is_not_generated_from(model: GPT, layer: str) -> None:
    getattr(model.blocks[0].feed_forward, layer).bias = None
    for call in (lambda: model(START), lambda: model.generate(START, 3)):
        with pytest.raises(TypeError, match=r"b\d is NoneType, expected a torch\.Tensor"):
            call()
