"""The CPU engine behind `GPT.stream`: many at once, draws given back, accuracy."""

from __future__ import annotations

import copy
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from spread import START, new_model
from torch import Tensor
from torch.nn import functional as F

from gpt_ext import GPT, engine, sequences
from gpt_ext.ops import decode
from tests.corpus import sentences

FORMS = decode.FORMATS


@pytest.fixture
def model() -> GPT:
    return new_model()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("set_default", "other", "usual"),
    [
        (torch.set_default_dtype, torch.float64, torch.float32),
        (torch.set_default_device, "meta", None),
    ],
)
def test_torchs_defaults_change_nothing(
    model: GPT, form: decode.WeightFormat, set_default: Callable[[Any], None], other: Any,
    usual: Any, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(sequences, "CALL_FLOPS", 1e5)  # the prompts take several calls
    prompts, generator = list(torch.randint(40, (2, 70))), seeded(7)
    options: dict[str, Any] = {
        "repetition_penalty": 1.5, "stop": [3], "dtype": form, "generator": generator,
    }  # fmt: skip

    def results() -> list[Tensor]:
        generator.manual_seed(7)
        texts: list[Tensor] = model.generate(prompts, 60, **options)
        begun = next(model.stream(prompts, 60, **options))  # and dropped
        return [*texts, begun, generator.get_state()]

    expected = results()
    set_default(other)
    try:
        found = results()
    finally:
        set_default(usual)
    assert all(map(torch.equal, found, expected))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_generators_at_once_give_the_text_they_give_alone(model: GPT) -> None:
    def text(seed: int, form: decode.WeightFormat) -> Tensor:
        return model.generate(START, 120, generator=seeded(seed), dtype=form, overflow="reprefill")

    jobs = [(seed, form) for seed in range(4) for form in FORMS]
    alone = {job: text(*job) for job in jobs}
    together: dict[Any, Tensor] = {}
    threads = [
        threading.Thread(target=lambda job=job: together.update({job: text(*job)})) for job in jobs
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(together[job], alone[job]) for job in jobs)


def test_streams_taken_in_turn_give_the_text_they_give_alone(model: GPT) -> None:
    streams = [model.stream(START, 50, generator=seeded(seed)) for seed in range(3)]
    in_turn = torch.stack([torch.cat(tokens) for tokens in zip(*streams, strict=True)], dim=1)
    for seed, text in enumerate(in_turn):
        assert torch.equal(text, model.generate(START, 50, generator=seeded(seed))[0, 1:])


def test_sequences_that_join_and_leave_get_the_text_they_get_alone(model: GPT) -> None:
    ways = [
        sequences.Sampling(0.5, top_k=9),
        sequences.Sampling(2.0, top_p=0.8),
        sequences.Sampling(0.0),
        sequences.Sampling(repetition_penalty=1.5),
    ]
    prompts = [torch.randint(40, (length,)).tolist() for length in (1, 32, 7, 20)]
    slots = sequences.Slots(engine.engine_for(model, "float32"), 3, 32, 32, 8)
    going: dict[int, sequences.Group] = {}
    texts: list[list[int]] = []
    while len(texts) < 40 or going:
        while len(texts) < 40 and len(going) < 3:
            number = len(texts)
            way, prompt = ways[number % 4], prompts[number % 3]
            going[number] = slots.join([prompt], way, seeded(number))
            texts.append([])
        drawn = slots.next_chunk(1 + len(texts) % 5)
        for number, group in list(going.items()):
            texts[number] += drawn[:, group.slots.start].tolist()
            if len(texts[number]) > 10 + 3 * number:
                slots.leave(going.pop(number))
    for number, text in enumerate(texts):
        prompt = torch.tensor([prompts[number % 3]])
        options = vars(ways[number % 4]) | {"generator": seeded(number), "overflow": "reprefill"}
        alone = model.generate(prompt, len(text), **options)[0, prompt.shape[1] :]
        assert text == alone.tolist(), number


@pytest.mark.parametrize("form", FORMS)
def test_a_generator_a_row_draws_what_the_row_alone_draws(
    model: GPT, form: decode.WeightFormat
) -> None:
    prompts = [torch.randint(40, (length,)) for length in (1, 9, 32, 50)]
    options: dict[str, Any] = {"dtype": form, "stop": [7], "repetition_penalty": 1.2, "top_k": 20}
    texts = model.generate(prompts, 60, generator=[seeded(i) for i in range(4)], **options)
    assert any(int(text[-1]) == 7 for text in texts)
    for i, prompt in enumerate(prompts):
        alone = model.generate(prompt[None], 60, generator=seeded(i), **options)[0]
        assert torch.equal(texts[i], alone[: len(texts[i])])
        assert torch.equal(texts[i][: len(prompt)], prompt)
        assert int(texts[i][-1]) == 7 or len(texts[i]) == len(prompt) + 60


def test_stop_ends_a_row_and_all_rows_the_stream(model: GPT) -> None:
    free = model.generate(START.expand(3, 1), 60, generator=seeded(1))[:, 1:]
    stop = [int(free[0, 20]), int(free[1, 5])]
    generator = seeded(1)
    out = torch.stack(list(model.stream(START.expand(3, 1), 60, generator=generator, stop=stop)), 1)
    ends = [int(torch.isin(row, torch.tensor(stop)).nonzero()[0]) for row in free]
    assert out.shape[1] == max(ends) + 1 < 60
    for row, expected, end in zip(out, free, ends, strict=True):
        assert torch.equal(row[: end + 1], expected[: end + 1])
        assert (row[end:] == expected[end]).all()
    # As many random numbers are gone as tokens were drawn.
    other = seeded(1)
    list(model.stream(START.expand(3, 1), max(ends) + 1, generator=other))
    assert torch.equal(generator.get_state(), other.get_state())


@pytest.mark.parametrize("used", [1, 2, 17, 40])
def test_a_stream_closed_early_leaves_the_generator_where_its_tokens_do(
    model: GPT, used: int
) -> None:
    generator, other = seeded(2), seeded(2)
    tokens = model.stream(START, 1000, generator=generator)
    taken = [next(tokens) for _ in range(used)]
    tokens.close()  # type: ignore[attr-defined]
    assert torch.equal(torch.cat(taken), model.generate(START, used, generator=other)[0, 1:])
    assert torch.equal(generator.get_state(), other.get_state())


@pytest.mark.parametrize("used", [1, 17, 24])
def test_nor_does_a_stop_id_further_on_change_that(model: GPT, used: int) -> None:
    text = model.generate(START, 40, generator=seeded(2))[0, 1:].tolist()
    stop = next(text[i] for i in range(25, 40) if text[i] not in text[:i])
    generator, other = seeded(2), seeded(2)
    tokens = model.stream(START, 40, generator=generator, stop=[stop])
    for _ in range(used):
        next(tokens)
    tokens.close()  # type: ignore[attr-defined]
    model.generate(START, used, generator=other)
    assert torch.equal(generator.get_state(), other.get_state())


def test_a_child_that_fork_made_writes_what_its_parent_does() -> None:
    # In a process of its own, whose OpenMP threads the child does not have.
    program = """
import os, torch
from gpt_ext import GPT
torch.set_num_threads(2)
model, start = GPT(40, 32, 48, 2, 4), torch.zeros(1, 1, dtype=torch.int64)
texts = [model.generate(start, 20, temperature=0, dtype=form) for form in ("float32", "int8")]
if (child := os.fork()) == 0:
    again = GPT(40, 32, 48, 2, 4)  # to be packed, which a thread beside does
    again.load_state_dict(model.state_dict())
    same = torch.equal(again.generate(start, 20, temperature=0, dtype="int8"), texts[1])
    os._exit(0 if same else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_a_dropped_stream_leaves_a_generator_alone_that_others_seeded(model: GPT) -> None:
    tokens = model.stream(START, 1000)
    for _ in range(20):
        next(tokens)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    del tokens
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("stride", [None, 1, 5, 31])
def test_reprefill_keeps_the_end_of_the_window_and_computes_it_anew(
    model: GPT, stride: int | None
) -> None:
    text = START
    with torch.no_grad():
        seen = 1
        for _ in range(100):
            if seen > 32:
                seen = 32 - (8 if stride is None else stride)
            text = torch.cat((text, model(text[:, -seen:])[:, -1:].argmax(-1)), dim=1)
            seen += 1
    ours = model.generate(START, 100, temperature=0, overflow="reprefill", stride=stride)
    assert torch.equal(ours, text)


def test_pytorchs_loop_has_the_same_options(model: GPT) -> None:
    for options in (
        {"overflow": "reprefill", "stride": 5}, {"repetition_penalty": 1.5}, {"stop": [3, 8]},
        {"top_p": 0.8, "temperature": 0.7}, {"generator": [seeded(5), seeded(6)]},
    ):  # fmt: skip
        prompt = torch.randint(40, (2, 5))
        results = []
        for change in (lambda model: None, add_idle_hook):
            twin = copy.deepcopy(model)
            change(twin)
            kept = {
                k: [seeded(5), seeded(6)] if k == "generator" else v for k, v in options.items()
            }
            torch.manual_seed(3)
            results.append(twin.generate(prompt, 70, **kept))
        assert torch.equal(*results), options


def add_idle_hook(model: GPT) -> None:
    model.blocks[0].register_forward_hook(lambda *_: None)


@pytest.fixture(scope="module")
def trained() -> tuple[GPT, Tensor, Tensor]:
    """A small model that has learned, and training and held-out tokens of its text."""
    torch.manual_seed(0)
    text = sentences(60_000)
    vocabulary = sorted(set(text))
    tokens = torch.tensor([vocabulary.index(c) for c in text])
    model = GPT(len(vocabulary), 64, 64, 2, 4, dropout=0.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        starts = torch.randint(50_000, (16,)).tolist()
        batch = torch.stack([tokens[i : i + 65] for i in starts])
        optimizer.zero_grad()
        model.loss(batch[:, :-1], batch[:, 1:]).backward()
        optimizer.step()
    return model.eval(), tokens[:50_000], tokens[50_000:]


def perplexity(model: GPT, tokens: Tensor, form: decode.WeightFormat) -> float:
    """Of the held-out tokens, 64 at a time from an empty cache, by the engine's own logits."""
    config, native = model.config, engine.engine_for(model, form)
    batch = tokens[: 64 * 65 * 2].view(-1, 65)
    rows = len(batch)
    cache = decode.Cache.empty(2, rows, 4, 64, config.model_dim // 4, form)
    loss = 0.0
    for t in range(64):
        at = torch.stack([batch[:, t], torch.arange(rows), torch.full((rows,), t)])
        _, logits = decode.generate(native.packed, cache, at, rows, 1)
        logits = logits[:, : config.vocab_size].double()
        loss += float(F.cross_entropy(logits, batch[:, t + 1]))
    return float(torch.tensor(loss / 64, dtype=torch.float64).exp())


def test_narrow_weights_predict_held_out_text_almost_as_well(
    trained: tuple[GPT, Tensor, Tensor],
) -> None:
    model, _, held_out = trained
    exact = perplexity(model, held_out, "float32")
    assert exact < 6, "the model is to have learned something"
    assert perplexity(model, held_out, "bfloat16") < exact * 1.001
    assert perplexity(model, held_out, "int8") < exact * 1.005
