"""GPT: the seed's architecture, its parameters, and what it does with bad arguments."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import Course
from torch.nn import functional as F

from gpt_ext import GPT, GPTConfig, generate

SEED = dict(vocab_size=104, context_length=128, model_dim=252, num_blocks=6, num_heads=6)
SMALL = dict(vocab_size=31, context_length=16, model_dim=24, num_blocks=2, num_heads=4)


def small_tokens(device: str = "cpu") -> torch.Tensor:
    return torch.arange(3 * 16, device=device).reshape(3, 16) % 31


def test_the_seeds_example_runs_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = Course(**SEED).state_dict()
    assert len(weights) == 174
    assert sum(tensor.numel() for tensor in weights.values()) == 4_672_688
    monkeypatch.chdir(tmp_path)
    torch.save(weights, "weights.pt")
    device = "cpu"
    int_to_char = {i: chr(32 + i) for i in range(104)}

    model = GPT(vocab_size=104, context_length=128, model_dim=252, num_blocks=6, num_heads=6).to(
        device
    )
    model.load_state_dict(torch.load("weights.pt", map_location=device))
    model.eval()

    context = torch.zeros(1, 1, dtype=torch.int64).to(device)
    assert len(generate(model, 20, context, 128, int_to_char)) == 20
    assert sum(p.numel() for p in model.parameters()) == 4_672_688


def test_logits_and_gradients_are_those_of_the_seeds_class(device: str) -> None:
    theirs = Course(**SMALL).to(device).double().eval()
    ours = GPT(**SMALL).to(device).double().eval()
    ours.load_state_dict(theirs.state_dict())
    tokens, targets = small_tokens(device), small_tokens(device).flip(1)
    expected = theirs(tokens)
    torch.testing.assert_close(ours(tokens), expected, rtol=1e-9, atol=1e-9)

    expected_loss = F.cross_entropy(expected.flatten(0, 1), targets.flatten())
    loss = ours.loss(tokens, targets)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-9, atol=1e-9)
    expected_loss.backward()
    loss.backward()
    gradients = {key: p.grad for key, p in theirs.named_parameters()}
    expected_gradients = GPT(**SMALL).to(device).double()
    expected_gradients.load_state_dict(gradients)  # packs heads as it packs their weights
    for (name, parameter), gradient in zip(
        ours.named_parameters(), expected_gradients.parameters(), strict=True
    ):
        torch.testing.assert_close(
            parameter.grad, gradient.detach(), rtol=1e-8, atol=1e-10, msg=name
        )


def test_parameters_start_distributed_as_the_seeds() -> None:
    sizes = dict(vocab_size=200, context_length=100, model_dim=64, num_blocks=2, num_heads=4)
    ours, theirs = GPT(**sizes), GPT(**sizes)
    theirs.load_state_dict(Course(**sizes).state_dict())
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert mine.mean().item() == pytest.approx(other.mean().item(), abs=0.05), name
        assert mine.std().item() == pytest.approx(other.std().item(), rel=0.25), name
        assert mine.max().item() == pytest.approx(other.max().item(), rel=0.25), name


def test_dropout_acts_in_training_alone() -> None:
    model = GPT(**SMALL, dropout=0.5)
    assert not torch.equal(model(small_tokens()), model(small_tokens()))
    model.eval()
    assert torch.equal(model(small_tokens()), model(small_tokens()))


def test_dropout_has_the_seeds_places() -> None:
    """With everything dropped, the blocks add nothing to the embeddings."""
    model = GPT(**SMALL, dropout=1.0)
    residual = model.token_embedding.weight[small_tokens()] + model.position_embedding.weight
    expected = model.vocab_projection(model.final_norm(residual))
    torch.testing.assert_close(model(small_tokens()), expected)


def test_a_position_depends_on_no_later_one() -> None:
    model = GPT(**SMALL).eval()
    tokens = small_tokens()
    changed = tokens.clone()
    changed[:, 9:] = (changed[:, 9:] + 5) % 31
    assert torch.equal(model(tokens)[:, :9], model(changed)[:, :9])


def test_shapes_from_nothing_to_the_full_context(device: str) -> None:
    model = GPT(**SMALL).to(device)
    for batch, time in ((1, 1), (2, 7), (1, 16), (0, 5), (2, 0)):
        tokens = torch.zeros(batch, time, dtype=torch.int64, device=device)
        assert model(tokens).shape == (batch, time, 31)


def test_loss_of_a_uniform_model_is_the_logarithm_of_the_vocabulary() -> None:
    model = GPT(**SMALL)
    torch.nn.init.zeros_(model.vocab_projection.weight)
    torch.nn.init.zeros_(model.vocab_projection.bias)
    assert model.loss(small_tokens(), small_tokens()).item() == pytest.approx(math.log(31))


def test_targets_of_minus_100_do_not_count() -> None:
    model = GPT(**SMALL).eval()
    targets = small_tokens().clone()
    targets[:, 5:] = -100
    expected = model.loss(small_tokens()[:, :5], targets[:, :5])
    torch.testing.assert_close(model.loss(small_tokens(), targets), expected)


def test_a_small_model_learns(device: str) -> None:
    model = GPT(**SMALL, dropout=0.0).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    x = small_tokens(device)
    y = (x + 1) % 31
    for _ in range(60):
        optimizer.zero_grad()
        loss = model.loss(x, y)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vocab_size": 0}, "vocab_size must be a positive integer, got 0"),
        ({"context_length": -3}, "context_length must be a positive integer, got -3"),
        ({"model_dim": 24.0}, "model_dim must be a positive integer, got 24.0"),
        ({"num_blocks": "2"}, "num_blocks must be a positive integer, got '2'"),
        ({"num_heads": 5}, "num_heads must divide model_dim, got 5 heads of 24"),
        ({"model_dim": 1028}, "model_dim / num_heads must be at most 256, got 1028 / 4"),
        ({"dropout": 1.5}, "dropout must be from 0 to 1, got 1.5"),
        ({"dropout": "0.1"}, "dropout must be from 0 to 1, got '0.1'"),
        ({"dropout": math.nan}, "dropout must be from 0 to 1, got nan"),
        ({"activation": "tanh"}, "activation must be one of .*, got 'tanh'"),
    ],
)
def test_arguments_that_make_no_model(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPT(**{**SMALL, **arguments})


def test_config_is_what_the_model_was_built_with() -> None:
    model = GPT(**SMALL, dropout=0.1, activation="gelu", qkv_bias=True)
    assert model.config == GPTConfig(**SMALL, dropout=0.1, activation="gelu", qkv_bias=True)


@pytest.mark.parametrize("bad", [31, 999, -1])
def test_an_id_outside_the_vocabulary_is_named(bad: int) -> None:
    tokens = small_tokens()
    tokens[1, 3] = bad
    with pytest.raises(IndexError, match=rf"tokens\[1, 3\] is {bad}, expected 0 to 30"):
        GPT(**SMALL)(tokens)


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        (
            torch.zeros(1, 17, dtype=torch.int64),
            ValueError,
            "position 17, beyond context_length=16",
        ),
        (torch.zeros(5, dtype=torch.int64), ValueError, r"shaped \(B, T\), got \(5,\)"),
        (torch.zeros(1, 2, 3, dtype=torch.int64), ValueError, r"shaped \(B, T\), got \(1, 2, 3\)"),
        (torch.zeros(1, 5), TypeError, "int64 tensor, got torch.float32"),
        (torch.zeros(1, 5, dtype=torch.int32), TypeError, "int64 tensor, got torch.int32"),
        ([[1, 2]], TypeError, "int64 tensor, got list"),
    ],
)
def test_tokens_of_another_kind(tokens: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        GPT(**SMALL)(tokens)


def test_targets_of_another_shape() -> None:
    with pytest.raises(ValueError, match=r"targets must be shaped like tokens, \(3, 16\)"):
        GPT(**SMALL).loss(small_tokens(), small_tokens()[:, 1:])


def test_tokens_and_targets_that_are_no_tensors() -> None:
    with pytest.raises(TypeError, match="tokens must be an int64 tensor, got list"):
        GPT(**SMALL).loss([[1]], small_tokens())
    with pytest.raises(TypeError, match=r"targets has dtype list, expected torch\.int64"):
        GPT(**SMALL).loss(small_tokens(), [[1]])


def test_copies_and_pickles_give_the_same_logits_and_are_independent() -> None:
    model = GPT(**SMALL).eval()
    expected = model(small_tokens())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(small_tokens()), expected)
        torch.nn.init.zeros_(twin.vocab_projection.weight)
        assert torch.equal(model(small_tokens()), expected)


def test_on_the_meta_device_shapes_alone_are_computed() -> None:
    with torch.device("meta"):
        model = GPT(**SMALL)
        logits = model(torch.zeros(2, 16, dtype=torch.int64))
    assert logits.is_meta
    assert logits.shape == (2, 16, 31)
    model.load_state_dict(Course(**SMALL).state_dict(), assign=True)
    assert model(small_tokens()).shape == (3, 16, 31)


def test_compiles_without_a_graph_break() -> None:
    model = GPT(**SMALL, dropout=0.0)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(small_tokens()), model(small_tokens()))
    compiled(small_tokens()).sum().backward()
    assert model.token_embedding.weight.grad is not None


def test_gradients_by_torch_func_for_each_sample() -> None:
    model = GPT(**SMALL, dropout=0.0)
    parameters = dict(model.named_parameters())

    def loss(parameters: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
        logits = torch.func.functional_call(model, parameters, (tokens[None],))
        return F.cross_entropy(logits[0], tokens)

    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(
        parameters, small_tokens()
    )
    alone = torch.func.grad(loss)(parameters, small_tokens()[1])
    for name, gradient in alone.items():
        torch.testing.assert_close(gradients[name][1], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_the_loss_is_that_of_the_logits() -> None:
    model = GPT(**SMALL).eval()
    targets = small_tokens().flip(1)
    expected = F.cross_entropy(model(small_tokens()).flatten(0, 1), targets.flatten())
    torch.testing.assert_close(model.loss(small_tokens(), targets), expected)


def test_a_target_outside_the_vocabulary_is_named() -> None:
    targets = small_tokens()
    targets[2, 7] = 31
    with pytest.raises(IndexError, match=r"targets\[2, 7\] is 31, expected 0 to 30 or ignore_ind"):
        GPT(**SMALL).loss(small_tokens(), targets)


def test_dropout_follows_torchs_generator() -> None:
    model = GPT(**SMALL, dropout=0.5)
    losses = []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        losses.append(model.loss(small_tokens(), small_tokens()).item())
    assert losses[0] == losses[2] != losses[1]


def test_all_gradients_are_the_same_for_any_number_of_threads() -> None:
    model = GPT(**SMALL, dropout=0.1)
    every = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        model.zero_grad()
        model.loss(small_tokens(), small_tokens()).backward()
        every.append([p.grad for p in model.parameters()])
    assert all(all(map(torch.equal, one, every[0])) for one in every[1:])


def test_under_bfloat16_autocast_the_stream_and_the_loss_stay_float32() -> None:
    model = GPT(**SMALL, dropout=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.hidden(small_tokens()).dtype == torch.float32
        assert model(small_tokens()).dtype == torch.bfloat16
        loss = model.loss(small_tokens(), small_tokens())
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def test_under_bfloat16_autocast_a_model_learns_as_in_float32() -> None:
    def losses(autocast: bool) -> torch.Tensor:
        torch.manual_seed(0)
        model = GPT(**SMALL, dropout=0.1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
        seen = []
        for step in range(60):
            x = (small_tokens() * 7 + step) % 31
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                loss = model.loss(x, (x + 1) % 31)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen.append(loss.detach())
        return torch.stack(seen)

    exact, narrow = losses(False), losses(True)
    assert exact[-1] < 0.5 * exact[0]
    torch.testing.assert_close(narrow, exact, rtol=0.03, atol=0.03)
