"""The raw ops of the decode engine: logits against a float64 decoder, draws, packs and hashes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gpt_ext import _C
from gpt_ext.ops import decode
from tests.compare import assert_as_good_as_torch

EPS = 1e-5
ACTIVATIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


@pytest.fixture(params=_C.supported_simd_levels(), autouse=True)
def level(request: pytest.FixtureRequest) -> Any:
    """Every SIMD level that this CPU has."""
    chosen = _C.simd_level()
    _C.set_simd_level(request.param)
    yield request.param
    _C.set_simd_level(chosen)


class Model:
    """Random weights in the order of `decode.pack`, and what a decoder makes of them."""

    def __init__(
        self, vocab: int = 37, context: int = 40, dim: int = 42, blocks: int = 2, heads: int = 3,
        activation: str = "relu",
    ) -> None:  # fmt: skip
        self.vocab, self.context, self.dim, self.blocks = vocab, context, dim, blocks
        self.heads, self.activation = heads, activation
        hidden = 4 * dim
        torch.manual_seed(1)

        def linear(outputs: int, inputs: int) -> list[Tensor]:
            return [torch.randn(outputs, inputs) * 1.5 / inputs**0.5, torch.randn(outputs) / 4]

        def norm() -> list[Tensor]:
            return [1 + torch.randn(dim) / 4, torch.randn(dim) / 4]

        self.weights = [torch.randn(vocab, dim), torch.randn(context, dim), *norm()]
        self.weights += linear(vocab, dim)
        for _ in range(blocks):
            self.weights += [*norm(), *linear(3 * dim, dim), *linear(dim, dim)]
            self.weights += [*norm(), *linear(hidden, dim), *linear(dim, hidden)]

    def packed(self, form: decode.WeightFormat = "float32") -> Tensor:
        return decode.pack(self.weights, self.heads, self.activation, form, EPS)

    def cache(
        self, sequences: int, form: decode.WeightFormat = "float32", positions: int | None = None
    ) -> decode.Cache:
        head_size = self.dim // self.heads
        return decode.Cache.empty(
            self.blocks, sequences, self.heads, positions or self.context, head_size, form
        )

    def logits(
        self, tokens: Tensor, dtype: torch.dtype = torch.float64, rounded: Any = None
    ) -> Tensor:
        """(B, T, V) by the definitions; `rounded` is applied to each matrix that is multiplied."""
        w = [t.to(dtype) for t in self.weights]
        matrix = (lambda t: t) if rounded is None else (lambda t: rounded(t.float()).to(dtype))

        def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return F.layer_norm(x, (self.dim,), weight, bias, EPS)

        x = w[0][tokens] + w[1][: tokens.shape[1]]
        past = torch.ones(2 * tokens.shape[1:], dtype=torch.bool).tril()
        for i in range(self.blocks):
            b = w[6 + 12 * i : 18 + 12 * i]
            qkv = norm(x, b[0], b[1]) @ matrix(b[2]).T + b[3]
            q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            scores = q @ k.mT / math.sqrt(self.dim / self.heads)
            attended = scores.masked_fill(~past, -math.inf).softmax(-1) @ v
            x = x + attended.transpose(1, 2).flatten(2) @ matrix(b[4]).T + b[5]
            hidden = ACTIVATIONS[self.activation](norm(x, b[6], b[7]) @ matrix(b[8]).T + b[9])
            x = x + hidden @ matrix(b[10]).T + b[11]
        return norm(x, w[2], w[3]) @ matrix(w[4]).T + w[5]


def rows_of(tokens: Tensor) -> Tensor:
    """All tokens (B, T) as rows, the last of each sequence at the end."""
    batch, time = tokens.shape
    early = [(int(tokens[b, t]), b, t) for b in range(batch) for t in range(time - 1)]
    last = [(int(tokens[b, -1]), b, time - 1) for b in range(batch)]
    return torch.tensor(early + last).T.contiguous()


def stepwise(model: Model, tokens: Tensor, form: decode.WeightFormat = "float32") -> Tensor:
    """Logits (B, T, V), one step a position."""
    packed, cache = model.packed(form), model.cache(len(tokens), form)
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


def int8(w: Tensor) -> Tensor:
    scale = w.abs().amax(dim=1, keepdim=True) / 127
    return (w / scale).round() * scale


@pytest.mark.parametrize(
    ("form", "rounded"), [("bfloat16", lambda w: w.bfloat16()), ("int8", int8)]
)
@pytest.mark.parametrize("sizes", [{}, {"dim": 33, "heads": 3, "activation": "gelu"}])
def test_narrow_weights_are_rounded_and_the_rest_is_not_far_from_exact(
    form: decode.WeightFormat, rounded: Any, sizes: dict[str, Any]
) -> None:
    model = Model(**sizes)
    tokens = torch.randint(model.vocab, (2, model.context))
    with_rounded = model.logits(tokens, rounded=rounded)
    rounding = (with_rounded - model.logits(tokens)).abs().max()
    ours = stepwise(model, tokens, form).double()
    # What is left is the bfloat16 cache's rounding and, in bfloat16's own instructions, of rows.
    assert (ours - with_rounded).abs().max() < 0.8 * rounding + 0.02


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
    tokens = torch.randint(model.vocab, (2, 20))
    results = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        results.append(stepwise(model, tokens, form))
    assert all(torch.equal(result, results[0]) for result in results)


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
        ({"stop": torch.zeros(1)}, "stop has dtype Float, expected Long"),
        ({"temperature": 1.0, "noise": torch.ones(1, 2, 36)}, "noise has shape"),
        ({"packed": torch.zeros(99, dtype=torch.uint8)}, "pack is no pack"),
        ({"packed": Model().packed()[:-1]}, "pack is no pack"),
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
