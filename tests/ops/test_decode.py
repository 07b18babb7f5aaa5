"""The raw ops of the decode engine: logits against a float64 decoder, packs and hashes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from decoder import EPS, Model
from torch import Tensor

from gpt_ext.ops import decode
from tests.compare import assert_as_good_as_torch

pytestmark = pytest.mark.usefixtures("level")


def rows_of(tokens: Tensor) -> Tensor:
    """All tokens (B, T) as rows, the last of each sequence at the end."""
    batch, time = tokens.shape
    early = [(int(tokens[b, t]), b, t) for b in range(batch) for t in range(time - 1)]
    last = [(int(tokens[b, -1]), b, time - 1) for b in range(batch)]
    return torch.tensor(early + last).T.contiguous()


def stepwise(
    model: Model, tokens: Tensor, form: decode.WeightFormat = "float32",
    cached: decode.WeightFormat | None = None,
) -> Tensor:  # fmt: skip
    """Logits (B, T, V), one step a position, with the format's cache or that of another one."""
    packed, cache = model.packed(form), model.cache(len(tokens), cached or form)
    logits = []
    for t in range(tokens.shape[1]):
        rows = torch.stack([tokens[:, t], torch.arange(len(tokens)), torch.full((len(tokens),), t)])
        logits.append(decode.generate(packed, cache, rows, len(tokens), 1)[1])
    return torch.stack(logits, dim=1)[..., : model.vocab]


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"activation": "gelu", "dim": 33, "heads": 3, "vocab": 16},
        {"activation": "gelu_tanh", "dim": 64, "heads": 1, "blocks": 1, "vocab": 129},
        {"dim": 7, "heads": 7, "context": 17, "blocks": 3, "vocab": 1},
    ],
)
def test_float32_logits_are_as_exact_as_torchs(sizes: dict[str, Any]) -> None:
    model = Model(**sizes)
    tokens = torch.randint(model.vocab, (3, model.context))
    exact, torchs = model.logits(tokens), model.logits(tokens, torch.float32)
    assert_as_good_as_torch(["step by step"], [stepwise(model, tokens)], [torchs], [exact])
    for time in (1, 2, 5, model.context):
        packed, cache = model.packed(), model.cache(3)
        rows = rows_of(tokens[:, :time])
        _, logits = decode.generate(packed, cache, rows, 3, 1)
        assert_as_good_as_torch(
            [f"{time} at once"], [logits[:, : model.vocab]], [torchs[:, time - 1]],
            [exact[:, time - 1]],
        )  # fmt: skip


SMALL = [{}, {"dim": 33, "heads": 3, "activation": "gelu"}]


def int8(w: Tensor) -> Tensor:
    scale = w.abs().amax(dim=1, keepdim=True) / 127
    return (w / scale).round() * scale


def int8_rows(x: Tensor) -> Tensor:
    least, most = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    scale = (most - least) / 254
    return (x / scale).round() * scale


@pytest.mark.parametrize("sizes", SMALL)
def test_bfloat16_weights_are_rounded_and_the_rest_is_not_far_from_exact(
    sizes: dict[str, Any],
) -> None:
    model = Model(**sizes)
    tokens = torch.randint(model.vocab, (2, model.context))
    with_rounded = model.logits(tokens, rounded=lambda w: w.bfloat16())
    rounding = (with_rounded - model.logits(tokens)).abs().max()
    ours = stepwise(model, tokens, "bfloat16").double()
    # What is left is the cache's rounding and, in bfloat16's own instructions, that of rows.
    assert (ours - with_rounded).abs().max() < 0.8 * rounding + 0.02


@pytest.mark.parametrize("sizes", SMALL)
def test_int8_rounds_weights_and_rows_and_nothing_else(sizes: dict[str, Any]) -> None:
    model = Model(**sizes)
    tokens = torch.randint(model.vocab, (2, model.context))
    rounded = model.logits(tokens, rounded=int8, rounded_rows=int8_rows)
    ours = stepwise(model, tokens, "int8", cached="float32").double()
    # All but where a number of a row lies so near the middle of two integers that float32 decides.
    error = (ours - rounded).abs()
    assert error.median() < 1e-6
    assert error.max() < (rounded - model.logits(tokens)).abs().max()


def test_int8_sums_of_very_long_rows_do_not_overflow() -> None:
    model, hidden = Model(dim=2, heads=1, vocab=3, blocks=1), 70_000  # of 255 * 127 more than 2^31
    down = torch.tensor([[1.0], [-1.0]]).expand(2, hidden) / hidden
    model.weights[14:18] = [torch.zeros(hidden, 2), torch.ones(hidden), down, torch.zeros(2)]
    tokens = torch.randint(3, (1, 4))
    error = (stepwise(model, tokens, "int8") - model.logits(tokens)).abs().max()
    assert error < 0.1


@pytest.mark.parametrize("form", decode.FORMATS)
def test_a_sequence_gets_the_same_bits_alone_in_a_batch_and_in_pieces(
    form: decode.WeightFormat,
) -> None:
    model = Model()
    tokens = torch.randint(model.vocab, (7, 30))
    together = stepwise(model, tokens, form)
    alone = torch.cat([stepwise(model, row[None], form) for row in tokens])
    assert torch.equal(together, alone)
    packed, cache = model.packed(form), model.cache(7, form)
    for rows in rows_of(tokens).split(50, dim=1):
        finals = 7 if rows.shape[1] < 50 else 1
        _, logits = decode.generate(packed, cache, rows.contiguous(), finals, 1)
    assert torch.equal(logits[:, : model.vocab], together[:, -1])


@pytest.mark.parametrize("form", decode.FORMATS)
def test_the_number_of_threads_changes_no_bit(form: decode.WeightFormat) -> None:
    model = Model()
    packed, tokens = model.packed(form), torch.randint(model.vocab, (2, 20))
    calls = {  # few rows and many, which are cut in other ways
        "a prompt": (rows_of(tokens[:1]), 1, 1),
        "prompts": (rows_of(torch.randint(model.vocab, (3, model.context))), 3, 1),
        "many sequences": (rows_of(torch.randint(model.vocab, (49, 1))), 49, 3),
    }
    results = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        at_once = [
            decode.generate(packed, model.cache(49, form), *call)[1][:, : model.vocab]
            for call in calls.values()
        ]
        results.append([stepwise(model, tokens, form), *at_once])
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


@pytest.mark.parametrize("form", decode.FORMATS)
def test_texts_that_slide_are_computed_anew_each_step(form: decode.WeightFormat) -> None:
    model = Model()
    packed, steps = model.packed(form), 9
    texts = torch.randint(model.vocab, (3, model.context))
    noise = torch.empty(steps, 3, model.vocab).exponential_()

    def generate(texts: Tensor, noise: Tensor, **how: Any) -> tuple[Tensor, Tensor]:
        return decode.generate(
            packed, model.cache(3, form), rows_of(texts), 3, len(noise), temperature=1.0,
            noise=noise, **how,
        )  # fmt: skip

    expected, window = [], texts
    for step in noise.split(1):
        tokens, logits = generate(window, step)
        expected.append(tokens)
        window = torch.cat((window[:, 1:], tokens.T), dim=1)
    drawn, last = generate(texts, noise, slide=True)
    assert torch.equal(drawn, torch.cat(expected))
    assert torch.equal(last[:, : model.vocab], logits[:, : model.vocab])

    # One sequence ends: the others' tokens stay, and its own do not come.
    others = drawn[:, [0, 2]]
    first = next(i for i, token in enumerate(drawn[:, 1]) if token not in others)
    stop = drawn[first : first + 1, 1].clone()
    drawn[first + 1 :, 1] = -1
    again, _ = generate(texts, noise, slide=True, stop=stop)
    assert torch.equal(again, drawn)


@pytest.mark.parametrize("form", decode.FORMATS)
def test_runs_of_blocks_one_after_the_other_are_all_blocks(form: decode.WeightFormat) -> None:
    model = Model(blocks=3)
    tokens = torch.randint(model.vocab, (2, 25))
    rows = rows_of(tokens)
    packed, cache = model.packed(form), model.cache(2, form)
    early, last = rows[:, :-2].contiguous(), rows[:, -2:].contiguous()
    x = torch.full((early.shape[1], decode.aligned(model.dim)), math.nan)
    for first, end in ((0, 1), (1, 1), (1, 3)):
        decode.forward(x, packed, cache, early, first, end)
    _, logits = decode.generate(packed, cache, last, 2, 1)
    whole, other = model.cache(2, form), decode.generate
    assert torch.equal(logits, other(packed, whole, rows, 2, 1)[1])


@pytest.mark.parametrize("form", decode.FORMATS)
def test_what_a_cache_held_before_does_not_matter(form: decode.WeightFormat) -> None:
    model = Model(dim=33)
    tokens = torch.randint(model.vocab, (2, 25))
    packed, rows, logits = model.packed(form), rows_of(tokens), []
    for keys, values in ((0.0, 0.0), (math.nan, math.nan if form == "float32" else 1e30)):
        cache = model.cache(2, form)
        cache.keys.fill_(keys)
        cache.values.fill_(values)
        logits.append(decode.generate(packed, cache, rows, 2, 5)[1][:, : model.vocab])
    assert torch.equal(*logits)


@pytest.mark.parametrize("form", decode.FORMATS)
@pytest.mark.parametrize("damage", [math.nan, math.inf])
def test_a_weight_that_is_not_finite_gives_an_error(
    damage: float, form: decode.WeightFormat
) -> None:
    for place in range(len(Model().weights)):
        model = Model()
        model.weights[place].view(-1)[0] = damage  # of token 0, position 0, output 0
        rows = torch.tensor([[0], [0], [0]])
        with pytest.raises(RuntimeError, match="the model's logits are not finite: its weights"):
            decode.generate(model.packed(form), model.cache(1, form), rows, 1, 3)


def test_no_change_of_the_bytes_keeps_the_fingerprint() -> None:
    tensors = [torch.randn(3, 1000), torch.randn(300_001), torch.randn(2, 3, dtype=torch.float64)]
    first = decode.fingerprint(tensors)
    assert decode.fingerprint([t.clone() for t in tensors]) == first
    known = {first}

    def changed(tensor: Tensor) -> None:
        assert decode.fingerprint(tensors) not in known, "a change went unnoticed"
        known.add(decode.fingerprint(tensors))

    for tensor in tensors:
        flat = tensor.view(-1)
        for i in (0, 1, len(flat) // 2, len(flat) - 1):
            flat[i] = flat[i].nextafter(torch.tensor(9.0, dtype=tensor.dtype))
            changed(tensor)
        tensor.neg_()  # two flips of sign bits must not cancel
        changed(tensor)
        flat[:2] = flat[:2].flip(0)
        changed(tensor)
    assert decode.fingerprint(tensors[::-1]) not in known
    assert decode.fingerprint([tensors[0].view(-1), *tensors[1:]]) in known  # bytes, not shapes


ROWS = torch.tensor([[1, 2], [0, 1], [0, 0]])


def rows_with(place: tuple[int, int], value: int) -> Tensor:
    rows = ROWS.clone()
    rows[place] = value
    return rows


MIXED = decode.Cache(Model().cache(2).keys, Model().cache(2, "int8").values)


def damaged(**changes: int) -> Tensor:
    """A pack whose header says something else of the model: csrc/ops/decode.h has its order."""
    pack = Model().packed().clone()
    header = pack[8:72].view(torch.int64)
    for name, value in changes.items():
        place = ["vocab", "context", "dim", "blocks", "heads", "hidden", "activation"].index(name)
        header[place] = value  # the activation and, above it, the format: 32 bits each
    return pack


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": ROWS[:2]}, r"rows have shape \(2, 2\), expected \(3, R\)"),
        ({"rows": ROWS.int()}, "rows has dtype Int, expected Long"),
        ({"rows": rows_with((0, 0), 37)}, "the token of row 0 is 37, expected 0 to 36"),
        ({"rows": rows_with((0, 1), -1)}, "the token of row 1 is -1, expected 0 to 36"),
        ({"rows": rows_with((1, 1), 2)}, "the sequence of row 1 is 2, expected 0 to 1"),
        ({"rows": rows_with((2, 0), 40)}, "the position of row 0 is 40, expected 0 to 39"),
        ({"steps": 41}, "the position of row 0 is 0, expected 0 to -1"),
        ({"steps": 0}, "steps is 0, expected at least 1"),
        ({"finals": 3}, "finals is 3, expected 1 to 2"),
        ({"rows": ROWS[:, [0, 0]]}, "a sequence has two rows among the last 2"),
        ({"temperature": 1.0}, "noise is None, expected a tensor"),
        ({"temperature": -1.0}, "temperature is -1, expected finite and not negative"),
        ({"repetition_penalty": 2.0}, "seen is None, expected a tensor"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0, expected above 0"),
        ({"top_k": -1}, "top_k is -1, expected at least 0"),
        ({"top_p": 0.0}, "top_p is 0, expected above 0"),
        ({"slide": True, "rows": rows_with((2, 1), 1)}, "the position of row 1 is 1, expected 0"),
        ({"slide": True, "finals": 1}, "finals is 1, expected 2 where texts slide"),
        ({"stop": torch.zeros(1)}, "stop has dtype Float, expected Long"),
        ({"temperature": 1.0, "noise": torch.ones(1, 2, 36)}, "noise has shape"),
        ({"packed": torch.zeros(99, dtype=torch.uint8)}, "pack is no pack"),
        ({"packed": Model().packed()[:-1]}, "pack is no pack"),
        ({"packed": damaged(heads=0)}, "heads is 0, expected a divisor of 42"),
        ({"packed": damaged(hidden=0)}, "hidden width and blocks are 37, .* expected at least 1"),
        ({"packed": damaged(hidden=2**62)}, "pack is no pack"),
        ({"packed": damaged(activation=7)}, "unknown activation"),
        ({"cache": Model(dim=51).cache(2)}, "keys has shape"),
        ({"cache": MIXED}, "values has dtype BFloat16, expected Float"),
    ],
)
def test_bad_arguments_are_told(changes: dict[str, Any], message: str) -> None:
    model = Model()
    arguments = {"packed": model.packed(), "cache": model.cache(2), "rows": ROWS, "finals": 2}
    with pytest.raises(RuntimeError, match=message):
        decode.generate(**{**arguments, "steps": 1, **changes})


@pytest.mark.parametrize(
    ("place", "weight", "message"),
    [
        (9, torch.zeros(125), r"weights\[9\] has shape \(125\), expected \(126\)"),
        (1, torch.zeros(40), r"weights\[1\] has shape \(40\), expected \(T, C\)"),
        (0, torch.zeros(37, 40), "heads is 3, expected a divisor of 40"),
        (29, None, "weights are 29 tensors, expected 6 and 12 a block"),
    ],
)
def test_weights_that_make_no_model_are_told(
    place: int, weight: Tensor | None, message: str
) -> None:
    weights = Model().weights
    weights[place : place + 1] = [] if weight is None else [weight]
    with pytest.raises(RuntimeError, match=message):
        decode.pack(weights, 3, "relu", "float32", EPS)
