"""Generation: the seed's text for the seed's random numbers, and the sampling options."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from spread import START, new_model
from torch import Tensor, nn

from gpt_ext import GPT, generate, generation

INT_TO_CHAR = {i: chr(ord("0") + i) for i in range(40)}


@pytest.fixture
def model() -> GPT:
    return new_model(num_blocks=3)


@torch.no_grad()
def naive(model: nn.Module, new: int, context: Tensor, window: int) -> Iterator[tuple[int, Tensor]]:
    """The seed's loop: the whole window, its last position, one draw; yields token and logits."""
    for _ in range(new):
        logits = model(context[:, -window:])[:, -1]
        token = torch.multinomial(torch.softmax(logits, dim=-1), 1)
        context = torch.cat((context, token), dim=1)
        yield int(token), logits


@pytest.mark.parametrize("seed", [0, 1, 2, 3, 1234])
@pytest.mark.parametrize("window", [32, 11])
def test_the_text_is_the_seeds_within_and_past_the_window(
    model: GPT, seed: int, window: int
) -> None:
    torch.manual_seed(seed)
    expected = "".join(INT_TO_CHAR[token] for token, _ in naive(model, 160, START, window))
    after = torch.rand(1)
    assert len(set(expected)) > 10
    torch.manual_seed(seed)
    assert generate(model, 160, START, window, INT_TO_CHAR) == expected
    assert torch.equal(torch.rand(1), after), "the generator's state must be the seed's too"


def test_a_prompt_longer_than_the_window_is_cropped_as_the_seed_crops_it(model: GPT) -> None:
    prompt = torch.randint(40, (1, 50))
    torch.manual_seed(5)
    expected = "".join(INT_TO_CHAR[token] for token, _ in naive(model, 40, prompt, 32))
    torch.manual_seed(5)
    assert generate(model, 40, prompt, 32, INT_TO_CHAR) == expected


def test_a_sequence_of_characters_names_tokens_as_a_dict_does(model: GPT) -> None:
    torch.manual_seed(0)
    expected = generate(model, 20, START, 32, INT_TO_CHAR)
    torch.manual_seed(0)
    assert generate(model, 20, START, 32, [INT_TO_CHAR[i] for i in range(40)]) == expected


def test_tokens_follow_the_prompt_row_by_row(model: GPT, device: str) -> None:
    model.to(device)
    prompt = torch.randint(40, (3, 7), device=device)
    out = model.generate(prompt, 50, temperature=0)
    assert out.shape == (3, 57)
    assert torch.equal(out[:, :7], prompt)
    for row in range(3):
        alone = model.generate(prompt[row : row + 1], 50, temperature=0)
        assert torch.equal(out[row : row + 1], alone)


def test_draws_follow_the_default_generator_of_the_models_device(model: GPT, device: str) -> None:
    model.to(device)
    prompt = torch.randint(40, (2, 7), device=device)
    torch.manual_seed(3)
    first, second = (model.generate(prompt, 30) for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(model.generate(prompt, 30), first)
    assert not torch.equal(first, second)


def test_a_cuda_device_has_a_default_generator_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    generators = torch.Generator(), torch.Generator()
    monkeypatch.setattr(torch.cuda, "default_generators", generators)
    assert generation.default_generator(torch.device("cuda:1")) is generators[1]
    assert generation.default_generator(torch.device("cpu")) is torch.default_generator


def test_greedy_takes_the_likeliest_at_every_step(model: GPT) -> None:
    out = model.generate(START, 60, temperature=0)
    with torch.no_grad():
        for end in range(1, 61):
            logits = model(out[:, max(0, end - 32) : end])[0, -1]
            assert logits[out[0, end]] >= logits.max() - 1e-4


def test_a_generator_gives_the_same_tokens_and_leaves_the_default_one_alone(model: GPT) -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first, second = (
        model.generate(START, 50, generator=torch.Generator().manual_seed(7)) for _ in range(2)
    )
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(
        first, model.generate(START, 50, generator=torch.Generator().manual_seed(8))
    )


def frequencies(model: GPT, **sampling: Any) -> Tensor:
    """How often each token follows START, in 4000 draws."""
    drawn = model.generate(START.expand(4000, 1), 1, **sampling)[:, 1]
    return torch.bincount(drawn, minlength=40) / 4000


def first_probabilities(model: GPT, temperature: float = 1.0) -> Tensor:
    with torch.no_grad():
        return (model(START)[0, -1] / temperature).softmax(-1)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_are_distributed_as_the_softmax_at_that_temperature(
    model: GPT, temperature: float
) -> None:
    expected = first_probabilities(model, temperature)
    assert (frequencies(model, temperature=temperature) - expected).abs().max() < 0.035


def test_top_k_draws_from_the_k_likeliest_in_proportion(model: GPT) -> None:
    probabilities = first_probabilities(model)
    likeliest = probabilities.topk(3)
    expected = torch.zeros(40).scatter(0, likeliest.indices, likeliest.values)
    drawn = frequencies(model, top_k=3)
    assert set(drawn.nonzero().flatten().tolist()) == set(likeliest.indices.tolist())
    assert (drawn - expected / expected.sum()).abs().max() < 0.035


def test_top_k_of_one_is_greedy_and_beyond_the_vocabulary_is_all(model: GPT) -> None:
    assert torch.equal(model.generate(START, 40, top_k=1), model.generate(START, 40, temperature=0))
    everything, large = (
        model.generate(START, 40, top_k=k, generator=torch.Generator().manual_seed(0))
        for k in (None, 99)
    )
    assert torch.equal(everything, large)


@pytest.mark.parametrize("top_p", [0.05, 0.3, 0.8])
def test_top_p_keeps_the_smallest_set_that_reaches_it(model: GPT, top_p: float) -> None:
    values, order = first_probabilities(model).sort(descending=True)
    kept, total = set(), 0.0
    for value, token in zip(values.tolist(), order.tolist(), strict=True):
        kept.add(token)
        total += value
        if total >= top_p:
            break
    drawn = frequencies(model, top_p=top_p)
    assert set(drawn.nonzero().flatten().tolist()) <= kept
    assert set((drawn > 0.01).nonzero().flatten().tolist()) >= {
        token for token in kept if first_probabilities(model)[token] > 0.02
    }


def test_no_new_tokens_are_the_prompt(model: GPT) -> None:
    assert torch.equal(model.generate(START, 0), START)
    assert generate(model, 0, START, 32, INT_TO_CHAR) == ""


def test_stream_yields_what_generate_returns_one_by_one(model: GPT) -> None:
    tokens = model.stream(START, 40, generator=torch.Generator().manual_seed(3))
    first = next(tokens)
    assert first.shape == (1,)
    whole = torch.stack([first, *tokens], dim=1)
    expected = model.generate(START, 40, generator=torch.Generator().manual_seed(3))
    assert torch.equal(whole, expected[:, 1:])


def test_modes_and_gradients_are_as_before_even_between_tokens(model: GPT) -> None:
    model.train()
    model.blocks[1].eval()
    before = [module.training for module in model.modules()]
    tokens = model.stream(START, 5)
    next(tokens)
    assert [module.training for module in model.modules()] == before
    assert torch.is_grad_enabled()
    del tokens
    assert [module.training for module in model.modules()] == before
    assert model.generate(START, 3).grad_fn is None


def test_dropout_is_off_in_a_model_that_is_training(model: GPT) -> None:
    expected = model.generate(START, 40, temperature=0)
    assert torch.equal(model.train().generate(START, 40, temperature=0), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -0.1}, "temperature must be finite and not negative, got -0.1"),
        ({"temperature": math.nan}, "temperature must be finite and not negative, got nan"),
        ({"temperature": math.inf}, "temperature must be finite and not negative, got inf"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"top_p": 1.1}, "top_p must be above 0 and at most 1, got 1.1"),
        ({"top_p": math.nan}, "top_p must be above 0 and at most 1, got nan"),
        ({"max_new_tokens": -1}, "max_new_tokens must not be negative, got -1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be finite and above 0, got 0.0"),
        ({"dtype": "float16"}, "dtype must be one of float32, bfloat16, int8, got 'float16'"),
        ({"overflow": "drop"}, "overflow must be exact or reprefill, got 'drop'"),
        ({"stride": 3}, "stride is for overflow='reprefill', got 3 with 'exact'"),
        ({"overflow": "reprefill", "stride": 32}, "stride must be from 1 to 31, .* got 32"),
        ({"generator": []}, "generator must be one, or one a row: 1, got 0"),
    ],
)
def test_bad_options_are_told_at_the_call(
    model: GPT, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        model.stream(START, **{"max_new_tokens": 5, **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": "1"}, "temperature must be a number, got '1'"),
        ({"temperature": None}, "temperature must be a number, got None"),
        ({"top_k": 2.5}, "top_k must be an integer, got 2.5"),
        ({"top_p": "0.9"}, "top_p must be a number, got '0.9'"),
        ({"repetition_penalty": [1]}, r"repetition_penalty must be a number, got \[1\]"),
        ({"max_new_tokens": 5.0}, "max_new_tokens must be an integer, got 5.0"),
        ({"stop": 7}, "stop must be a sequence of token ids, got 7"),
        ({"stop": [1.7]}, "a stop id must be an integer, got 1.7"),
        ({"stop": "ab"}, "a stop id must be an integer, got 'a'"),
        ({"generator": 5}, "generator must be a torch.Generator, or one a row, got 5"),
        ({"generator": [None]}, r"torch.Generator, or one a row, got \[None\]"),
        ({"overflow": "reprefill", "stride": 2.5}, "stride must be an integer, got 2.5"),
    ],
)
def test_options_of_another_type_are_told_at_the_call(
    model: GPT, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        model.stream(START, **{"max_new_tokens": 5, **arguments})


def test_numbers_of_other_kinds_are_numbers(model: GPT) -> None:
    numpy = pytest.importorskip("numpy")
    for options in (
        {"temperature": numpy.float32(1), "top_k": numpy.int64(40)}, {"top_k": 10**400},
    ):  # fmt: skip
        torch.manual_seed(0)
        expected = model.generate(START, 40)
        torch.manual_seed(0)
        assert torch.equal(model.generate(START, 40, **options), expected)
    with pytest.raises(ValueError, match="temperature must be finite and not negative, got inf"):
        model.stream(START, 5, temperature=10**400)


@pytest.mark.parametrize(
    "stop", [{3}, iter([3]), torch.tensor([3]), range(3, 4)], ids=lambda stop: type(stop).__name__
)
def test_stop_ids_come_in_any_collection(model: GPT, stop: Any) -> None:
    prompts, options = [START[0], START[0] + 1], {"generator": torch.Generator().manual_seed(1)}
    texts = model.generate(prompts, 200, stop=stop, **options)
    options["generator"].manual_seed(1)
    assert all(map(torch.equal, texts, model.generate(prompts, 200, stop=[3], **options)))
    assert all(int(text[-1]) == 3 for text in texts)


def test_a_prompt_is_what_it_was_at_the_call(model: GPT) -> None:
    expected = model.generate(START, 20, temperature=0)[0, 1:]
    for prompts in (START.clone(), [START[0].clone()]):
        tokens = model.stream(prompts, 20, temperature=0)
        prompts[0][:] = 7
        assert torch.equal(torch.cat([*tokens]), expected)


def test_bad_prompts_are_told_at_the_call(model: GPT) -> None:
    with pytest.raises(ValueError, match=r"the prompt is empty: tokens are shaped \(1, 0\)"):
        model.stream(START[:, :0], 5)
    with pytest.raises(IndexError, match="token id 40 is outside the vocabulary, 0 to 39"):
        model.stream(torch.tensor([[40] + 50 * [1]]), 5)
    with pytest.raises(TypeError, match=r"int64 tensor, got torch\.float32"):
        model.stream(START.float(), 5)
    with pytest.raises(TypeError, match=r"a sequence of \(T,\), got NoneType"):
        model.stream(None, 5)
    with pytest.raises(TypeError, match="int64 tensor, got list"):
        generate(model, 5, [[0]], 32, INT_TO_CHAR)
    with pytest.raises(ValueError, match=r"one sequence, \(1, T\), got \(2, 1\)"):
        generate(model, 5, START.expand(2, 1), 32, INT_TO_CHAR)
    with pytest.raises(ValueError, match="context_length must be from 1 to the model's 32, got 33"):
        generate(model, 5, START, 33, INT_TO_CHAR)


def test_other_bad_arguments_are_told_at_the_call(model: GPT) -> None:
    with pytest.raises(IndexError, match="stop id 40 is outside the vocabulary, 0 to 39"):
        model.stream(START, 5, stop=[3, 40])
    with pytest.raises(ValueError, match=r"there is no prompt: tokens are shaped \(0, T\)"):
        model.stream([], 5)
    with pytest.raises(ValueError, match=r"prompt 1 must be a tensor shaped \(T,\), got \(1, 1\)"):
        model.stream([START[0], START], 5)
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        model.stream([START[0], START[0, :0]], 5)
    with pytest.raises(TypeError, match="stop must be a sequence of token ids"):
        model.stream(START, 5, stop=torch.tensor(5))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one is given for several rows"):
        model.stream(START.expand(2, 1), 5, generator=[torch.default_generator] * 2)
    model.blocks[1].feed_forward.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"dtype 'int8': .* blocks\[1\].feed_forward is no plain"):
        model.stream(START, 5, dtype="int8")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_damaged_weights_give_an_error_and_no_text(model: GPT, temperature: float) -> None:
    model.vocab_projection.bias.data[3] = math.nan
    with pytest.raises(RuntimeError, match="logits are not finite"):
        model.generate(START, 5, temperature=temperature)


@pytest.mark.parametrize("in_torch", [False, True])
def test_extreme_options_are_the_limits_they_tend_to(model: GPT, in_torch: bool) -> None:
    if in_torch:
        model.blocks[0].register_forward_hook(lambda *_: None)
    model.vocab_projection.weight.data.div_(2)
    model.vocab_projection.bias.data[:3] = torch.tensor([9.0, 7.0, 5.0])
    model.vocab_projection.weight.data[:3] = 0
    greedy = model.generate(START, 40, temperature=0)
    for options in ({"temperature": 1e-320}, {"temperature": 1e-38}, {"top_p": 1e-300}):
        assert torch.equal(model.generate(START, 40, **options), greedy), options
    flat = torch.bincount(model.generate(START, 4000, temperature=1e300)[0], minlength=40)
    assert flat.min() > 50
    for temperature in (0.0, 1.0):
        rewarded = model.generate(START + 2, 40, repetition_penalty=1e-50, temperature=temperature)
        assert (rewarded == 2).all(), "a token seen, its logit above 0, is all there is"
    penalised = model.generate(START, 25, repetition_penalty=1e300, temperature=0)
    assert penalised[0, 1:3].tolist() == [1, 2], "what was seen comes last"
