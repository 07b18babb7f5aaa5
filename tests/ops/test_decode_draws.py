"""The decode engine's draws: sampling parameters, noise, steps and stop tokens."""

from __future__ import annotations

import math

import pytest
import torch
from decoder import Model
from torch import Tensor

from gpt_ext.ops import decode

pytestmark = pytest.mark.usefixtures("level")


def test_many_steps_a_call_are_one_step_many_times() -> None:
    model = Model()
    packed, noise = model.packed(), torch.empty(30, 2, model.vocab).exponential_()
    start = torch.tensor([[3, 5], [0, 1], [0, 0]])
    tokens, logits = decode.generate(
        packed, model.cache(2), start, 2, 30, temperature=1, noise=noise
    )
    cache, rows = model.cache(2), start
    for t in range(30):
        drawn, last = decode.generate(
            packed, cache, rows, 2, 1, temperature=1, noise=noise[t : t + 1]
        )
        assert torch.equal(drawn[0], tokens[t])
        rows = torch.stack([drawn[0], torch.arange(2), torch.full((2,), t + 1)])
    assert torch.equal(last, logits)


def kept_by_top_p(p: Tensor, top_p: float) -> Tensor:
    values, order = p.sort(descending=True, stable=True)
    before = values.cumsum(0) - values
    return torch.zeros_like(p, dtype=torch.bool).scatter(0, order, before < top_p)


@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (2, 104), (4, 50257), (2, 3, 7001)], ids=str)
def test_noise_is_what_torch_draws(shape: tuple[int, ...]) -> None:
    ours, theirs = (torch.Generator().manual_seed(11) for _ in range(2))
    for _ in range(3):
        noise = torch.empty(shape).exponential_(generator=theirs)
        assert torch.equal(decode.exponential(shape, ours), noise)
        assert torch.equal(ours.get_state(), theirs.get_state())


@pytest.mark.parametrize("vocab", [5, 300])
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 0.3},
        {"temperature": 1.0, "top_k": 4},
        {"temperature": 2.0, "top_p": 0.7},
        {"temperature": 1.5, "top_k": 3, "top_p": 0.6, "repetition_penalty": 1.7},
        {"temperature": 0.0, "repetition_penalty": 3.0},
        {"temperature": 1e-45},
    ],
)
def test_draws_follow_the_definition(vocab: int, options: dict[str, float]) -> None:
    model = Model(vocab=vocab, blocks=1)
    packed, draws = model.packed(), 40
    rows = torch.stack(
        [torch.randint(vocab, (draws,)), torch.arange(draws), torch.zeros(draws).long()]
    )
    noise = torch.empty(1, draws, vocab).exponential_()
    seen = (torch.rand(draws, vocab) < 0.3).to(torch.uint8)
    plain_rows = decode.generate(packed, model.cache(draws), rows, draws, 1)[1][:, :vocab]
    before = seen.clone()
    tokens, _ = decode.generate(
        packed, model.cache(draws), rows, draws, 1, seen=seen, noise=noise, **options
    )
    penalty = options.get("repetition_penalty", 1.0)
    for b in range(draws):
        logits = plain_rows[b].double()
        logits = torch.where(
            before[b] == 1, torch.where(logits > 0, logits / penalty, logits * penalty), logits
        )
        if options["temperature"] == 0:
            assert tokens[0, b] == logits.argmax()
            continue
        logits = (logits - logits.max()) / options["temperature"]
        if "top_k" in options and options["top_k"] < vocab:
            logits[logits < logits.topk(options["top_k"]).values[-1]] = -math.inf
        p = logits.softmax(0)
        if "top_p" in options:
            p = p * kept_by_top_p(p, options["top_p"])
        race = p / noise[0, b]
        # float32 may settle a photo finish otherwise.
        assert race[tokens[0, b]] > race.max() * (1 - 1e-4)
    if penalty != 1:
        assert torch.equal(seen, before.scatter(1, tokens.T, 1))


def test_each_sequence_is_drawn_by_its_own_options() -> None:
    model = Model()
    packed, noise = model.packed(), torch.empty(20, 4, model.vocab).exponential_()
    start = torch.tensor([[3, 5, 9, 7], [0, 1, 2, 3], [0, 0, 0, 0]])
    options = {
        "repetition_penalty": torch.tensor([1, 1.7, 1, 1]),
        "temperature": torch.tensor([0, 1, 0.5, 2]),
        "top_k": torch.tensor([0, 0, 3, 0]),
        "top_p": torch.tensor([1, 1, 1, 0.6]),
    }
    seen = torch.zeros(4, model.vocab, dtype=torch.uint8)
    together, _ = decode.generate(
        packed, model.cache(4), start, 4, 20, seen=seen, noise=noise, **options
    )
    for b in range(4):
        row = torch.tensor([[int(start[0, b])], [0], [0]])
        alone, _ = decode.generate(
            packed, model.cache(1), row, 1, 20, seen=torch.zeros(1, model.vocab).byte(),
            noise=noise[:, b : b + 1].contiguous(), **{k: v[b] for k, v in options.items()},
        )  # fmt: skip
        assert torch.equal(together[:, b], alone[:, 0])


def test_a_stop_token_ends_its_sequence_alone() -> None:
    model = Model()
    packed, noise = model.packed(), torch.empty(35, 3, model.vocab).exponential_()
    start = torch.tensor([[3, 5, 9], [0, 1, 2], [0, 0, 0]])
    free, _ = decode.generate(packed, model.cache(3), start, 3, 35, temperature=1, noise=noise)
    stop = free[[4, 9], [0, 2]]
    tokens, _ = decode.generate(
        packed, model.cache(3), start, 3, 35, temperature=1, noise=noise, stop=stop
    )
    for b in range(3):
        ends = torch.isin(free[:, b], stop).nonzero()
        end = int(ends[0]) + 1 if len(ends) else 35
        assert torch.equal(tokens[:end, b], free[:end, b])
        assert (tokens[end:, b] == -1).all()
