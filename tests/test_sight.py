"""What one can see of a model: its costs against PyTorch's counts, its attention, its curves."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from architectures import Course, Head
from torch.utils.flop_counter import FlopCounterMode

from gpt_ext import GPT, costs, plots

SIZES = dict(vocab_size=29, context_length=24, model_dim=32, num_blocks=3, num_heads=4)


@pytest.fixture
def course() -> Course:
    """A plain PyTorch model, whose weights GPT loads."""
    return Course(**SIZES).eval()


@pytest.fixture
def model(course: Course) -> GPT:
    model = GPT(**SIZES)
    model.load_state_dict(course.state_dict())
    return model


def test_every_parameter_is_counted_once(model: GPT) -> None:
    counts = costs.parameters(model)
    assert counts == {
        "token embedding": 29 * 32,
        "position embedding": 24 * 32,
        "norms": 7 * 2 * 32,
        "attention": 3 * (4 * 32 * 32 + 32),
        "feed forward": 3 * (8 * 32 * 32 + 5 * 32),
        "vocab projection": 29 * 32 + 29,
    }
    assert sum(counts.values()) == sum(p.numel() for p in model.parameters())


def test_flops_are_what_pytorch_counts_less_the_half_that_is_masked(
    course: Course, model: GPT
) -> None:
    tokens = torch.zeros(1, 24, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        course(tokens)
    pairs = 24 * 24 - 24 * 25 // 2  # of a query and a key after it
    masked = 3 * 2 * 2 * pairs * 32
    assert costs.forward_flops(model.config) * 24 == counter.get_total_flops() - masked


def test_activations_are_what_backward_is_given_once_each(model: GPT) -> None:
    weight = model.token_embedding.weight

    def objective(tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        wave = weight.sin()  # keeps the weight, which is not counted
        return wave.exp().sum() + (wave * wave).sum()  # keep exp's result, and wave twice

    assert costs.activation_bytes(model, objective) == 2 * 4 * weight.numel()


def test_calls_a_second_leave_out_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    durations = itertools.chain([5.0], itertools.repeat(0.25))
    clock = 0.0

    def call() -> None:
        nonlocal clock
        clock += next(durations)

    monkeypatch.setattr(costs.time, "perf_counter", lambda: clock)
    assert costs.calls_a_second(call, seconds=2.0) == 4.0


def test_attention_is_that_of_the_model(course: Course, model: GPT) -> None:
    tokens = torch.randint(29, (17,))
    expected = []

    def note(head: Head, arguments: tuple[torch.Tensor], _: torch.Tensor) -> None:
        x = arguments[0][0].double()
        q, k = (x @ getattr(head, f"{part}_layer").weight.double().T for part in ("query", "key"))
        scores = q @ k.T / q.shape[-1] ** 0.5
        expected.append(
            scores.masked_fill(torch.ones(17, 17).triu(1).bool(), -torch.inf).softmax(1)
        )

    for head in (module for module in course.modules() if isinstance(module, Head)):
        head.register_forward_hook(note)
    course(tokens[None])
    weights = plots.attention_weights(model.train(), tokens)
    assert model.training
    assert weights.shape == (3, 4, 17, 17)
    wanted = torch.stack(expected).view(3, 4, 17, 17)
    torch.testing.assert_close(weights.double(), wanted, rtol=1e-5, atol=1e-6)
    last = plots.read(model, tokens, slice(-1, None))[0]
    assert torch.equal(last, weights[:, :, -1:])


def test_maps_and_curves_are_pictures(tmp_path: Path) -> None:
    image = pytest.importorskip("matplotlib.image")
    nothing, all_to_self = torch.zeros(1, 2, 3, 3), torch.eye(3).expand(1, 2, 3, 3)
    shades = []
    for weights in (nothing, all_to_self):
        plots.draw_attention(weights, ["a", "\n", "東"], tmp_path / "map.png")
        shades.append(image.imread(tmp_path / "map.png")[..., :3].mean())
    assert shades[1] < shades[0]
    records = [
        {"step": 1, "loss": 2.0},
        {"step": 2, "loss": None},
        {"step": 2, "validation_loss": 1.0},
    ]
    plots.draw_curves(records, tmp_path / "curves.png")
    assert image.imread(tmp_path / "curves.png").std() > 0
