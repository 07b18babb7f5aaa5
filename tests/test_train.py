"""Training: what a step does, and what a run leaves."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from devices import DEVICES
from runs import assert_equal_tensors, interrupt_after, records_of
from torch import Tensor, nn

from gpt_ext import GPT, checkpoint, optimizer, train
from gpt_ext.cuda_graph import Replayed
from gpt_ext.distributed import World
from gpt_ext.errors import UserError
from gpt_ext.options import TrainOptions

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_run_learns_and_leaves_its_files(begin: Callable[..., train.Trainer]) -> None:
    trainer = begin("run", steps=150, eval_every=50, learning_rate=1e-2)
    assert trainer.train()
    records = checkpoint.read_lines(trainer.run / "metrics.jsonl")
    evaluated = [r["validation_loss"] for r in records if "validation_loss" in r]
    assert [r["step"] for r in records if "validation_loss" in r] == [50, 100, 150]
    assert evaluated[-1] < 2.3 < math.log(len(trainer.data.tokenizer))
    logged = [r for r in records if "loss" in r]
    assert [r["step"] for r in logged] == list(range(4, 151, 4))
    assert all(r["tokens_per_second"] > 0 and r["gradient_norm"] > 0 for r in logged)
    assert sorted(path.name for path in trainer.run.iterdir()) == [
        "best.safetensors", "checkpoints", "config.json", "last.safetensors", "metrics.jsonl",
        "tokenizer.json",
    ]  # fmt: skip
    model, tokenizer = checkpoint.load_run(trainer.run)
    assert model.config == trainer.model.config
    assert tokenizer.to_json() == trainer.data.tokenizer.to_json()
    config = json.loads((trainer.run / "config.json").read_text())
    assert config["train"]["learning_rate"] == 1e-2


def test_the_best_checkpoint_is_that_of_the_lowest_validation_loss(
    begin: Callable[..., train.Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([3.0, 1.0, 2.0])
    weights = []
    monkeypatch.setattr(train.Trainer, "evaluate", lambda self: next(losses))
    save = train.Trainer.save

    def noting(self: train.Trainer, *loss: float) -> None:
        weights.append(self.model.token_embedding.weight.detach().clone())
        save(self, *loss)

    monkeypatch.setattr(train.Trainer, "save", noting)
    trainer = begin("run")
    trainer.train()
    best, _ = checkpoint.load_run(trainer.run)
    assert torch.equal(best.token_embedding.weight, weights[1])
    (trainer.run / checkpoint.BEST).unlink()
    last, _ = checkpoint.load_run(trainer.run)
    assert torch.equal(last.token_embedding.weight, weights[2])


@pytest.fixture
def damage_weights(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """damage_weights(n): the n-th loss and all later ones are NaN."""

    def damage(first: int) -> None:
        calls = iter(range(1, 10_000))
        loss = GPT.loss

        def damaged(self: GPT, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            good = loss(self, tokens, targets)
            return good * math.nan if self.training and next(calls) >= first else good

        monkeypatch.setattr(GPT, "loss", damaged)

    return damage


def test_steps_without_a_finite_loss_are_skipped_then_the_run_stops(
    begin: Callable[..., train.Trainer], damage_weights: Callable[[int], None]
) -> None:
    trainer = begin("run", max_skipped=5)
    damage_weights(11)
    with pytest.raises(
        UserError, match=r"5 steps in a row .* step 15, .* keeps the checkpoint of step 8"
    ):
        trainer.train()
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())
    records = checkpoint.read_lines(trainer.run / "metrics.jsonl")
    assert [r["loss"] for r in records if r["step"] == 12] == [None]
    assert train.resume(trainer.run).step == 8


def test_a_single_bad_step_is_left_out(
    begin: Callable[..., train.Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = begin("run")
    before = [p.detach().clone() for p in trainer.model.parameters()]
    with monkeypatch.context() as patch:
        patch.setattr(GPT, "loss", lambda self, x, y: self(x).sum() * math.inf)
        trainer.optimize()
    assert trainer.skipped == 1
    after = list(trainer.model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    trainer.optimize()
    assert trainer.skipped == 0
    assert not torch.equal(after[0], before[0])


def test_weights_gone_bad_are_not_saved_over_good_ones(
    begin: Callable[..., train.Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([2.0, math.nan])
    monkeypatch.setattr(train.Trainer, "evaluate", lambda self: next(losses))
    trainer = begin("run")
    with pytest.raises(UserError, match="validation loss is not finite: stopped at step 16"):
        trainer.train()
    assert train.resume(trainer.run).step == 8


def test_a_full_disk_keeps_the_checkpoint_before(
    begin: Callable[..., train.Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = begin("run")
    save = trainer.save

    def save_when_full(*loss: float) -> None:
        if trainer.step == 16:
            error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            monkeypatch.setattr(os, "fsync", lambda file: (_ for _ in ()).throw(error))
        save(*loss)

    monkeypatch.setattr(trainer, "save", save_when_full)
    with pytest.raises(UserError, match=r"cannot write .*safetensors: No space left on device"):
        trainer.train()
    monkeypatch.undo()
    assert not list(trainer.run.glob(".*"))
    checkpoint.load_run(trainer.run)
    resumed = train.resume(trainer.run)
    assert resumed.step == 8
    assert resumed.train()


def test_linear_weights_decay_and_nothing_else() -> None:
    model = GPT(7, 8, 16, 1, 2, qkv_bias=True)
    adamw = optimizer.build_optimizer(model, TrainOptions(weight_decay=0.5))
    decay = {id(p): g["weight_decay"] for g in adamw.param_groups for p in g["params"]}
    assert len(decay) == len(list(model.parameters()))
    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    for name, parameter in model.named_parameters():
        assert decay[id(parameter)] == (0.5 if id(parameter) in linear else 0.0), name


def test_the_learning_rate_rises_linearly_and_falls_as_a_cosine() -> None:
    options = TrainOptions(steps=110, warmup_steps=10, learning_rate=1.0, final_learning_rate=0.2)
    rates = [optimizer.learning_rate(step, options) for step in range(111)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == pytest.approx(1.0)
    assert rates[60] == pytest.approx(0.6)
    assert rates[110] == pytest.approx(0.2)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert optimizer.learning_rate(0, TrainOptions(warmup_steps=0)) == TrainOptions().learning_rate


def test_micro_batches_add_up_to_the_same_step(begin: Callable[..., train.Trainer]) -> None:
    steps = []
    for name, options in (
        ("whole", {}),
        ("parts", {"micro_batch_size": 1}),
        ("again", {"recompute": True}),
    ):
        trainer = begin(name, dropout=0.0, **options)
        losses = [trainer.optimize()["loss"] for _ in range(3)]
        steps.append((losses, torch.cat([p.flatten() for p in trainer.model.parameters()])))
    (losses, weights), parts, again = steps
    assert parts[0] == pytest.approx(losses, rel=1e-6)
    assert (parts[1] - weights).norm() < 1e-5 * weights.norm()
    assert again[0] == losses
    assert torch.equal(again[1], weights)


# dynamo looks at each input's, and hides the warning but where warnings are errors
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_compiled_blocks_train_as_eager_ones(begin: Callable[..., train.Trainer]) -> None:
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    losses = []
    for name, options in (("eager", {}), ("compiled", {"compile": True, "recompute": True})):
        trainer = begin(name, dropout=0.0, **options)
        losses.append([trainer.optimize()["loss"] for _ in range(3)])
    assert counters["stats"]["unique_graphs"] == 1  # which both blocks share
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_bfloat16_learns_as_float32_does(begin: Callable[..., train.Trainer]) -> None:
    losses, dtypes = [], set()
    for precision in ("float32", "bfloat16"):
        trainer = begin(precision, precision=precision, steps=60, eval_every=60, learning_rate=1e-2)
        trainer.train()
        losses.append(trainer.evaluate())
        dtypes |= {p.dtype for p in trainer.model.parameters()}
    assert dtypes == {torch.float32}
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


@pytest.fixture(params=["on a CPU", "on CUDA"])
def graph_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where a step is captured; a CPU calls again what it can't capture, on the same memory."""
    if request.param == "on CUDA":
        if "cuda" not in DEVICES:
            pytest.skip("CUDA graphs need a CUDA device")
        return "cuda"
    monkeypatch.setattr(Replayed, "aside", lambda self: self.function(*self.inputs))
    monkeypatch.setattr(Replayed, "captured", lambda self: self.aside)
    monkeypatch.setattr(train, "check_capture", lambda options, world: None)
    return "cpu"


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_a_captured_step_trains_as_the_plain_one(
    begin: Callable[..., train.Trainer], graph_device: str, precision: str
) -> None:
    if precision == "float16" and graph_device == "cpu":
        pytest.skip("float16 is for CUDA only")
    options = dict(precision=precision, device=graph_device, ema=0.9, micro_batch_size=2)
    plain, captured = begin("plain", **options), begin("captured", **options, cuda_graph=True)
    if precision != "float32":  # an ulp of another optimizer's may round to another 16-bit number
        plain.optimizer = optimizer.build_optimizer(plain.model, captured.options)
    assert plain.train()
    assert captured.train()
    assert isinstance(captured.advance, Replayed)
    assert captured.advance.replay is not None
    for one, other in zip(records_of(captured.run), records_of(plain.run), strict=True):
        assert one == pytest.approx(other, rel=1e-4)  # the rate is a float32 for a graph


def test_a_captured_step_is_left_out_where_it_is_bad(
    begin: Callable[..., train.Trainer], graph_device: str
) -> None:
    trainer = begin("run", device=graph_device, cuda_graph=True)
    for _ in range(6):
        trainer.optimize()
    before = {name: tensor.clone() for name, tensor in trainer.tensors().items()}
    weight = trainer.model.token_embedding.weight
    with torch.no_grad():
        weight.fill_(math.nan)
    record = trainer.optimize()
    assert math.isnan(record["loss"])
    assert trainer.skipped == 1
    with torch.no_grad():
        weight.copy_(before["model.token_embedding.weight"])
    after = trainer.tensors()
    del before["progress"], after["progress"]
    assert_equal_tensors(after, before)
    trainer.optimize()
    assert trainer.skipped == 0
    assert not torch.equal(weight, before["model.token_embedding.weight"])


def test_where_no_step_can_be_captured(
    begin: Callable[..., train.Trainer], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="cuda_graph needs a CUDA device, got device cpu"):
        begin("run", cuda_graph=True)
    assert not (tmp_path / "run").exists()
    world = World()
    monkeypatch.setattr(world, "device", torch.device("cuda"))
    train.check_capture(TrainOptions(), world)
    with pytest.raises(UserError, match="cuda_graph and recompute exclude each other"):
        train.check_capture(TrainOptions(recompute=True), world)
    monkeypatch.setattr(world, "size", 2)
    with pytest.raises(UserError, match="cuda_graph is for a single process, got 2"):
        train.check_capture(TrainOptions(), world)


def test_float16_is_refused_on_a_cpu(begin: Callable[..., train.Trainer], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="precision float16 has no kernels for CPUs: take bfloat16"):
        begin("run", precision="float16")
    assert not (tmp_path / "run").exists()


@pytest.fixture
def scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU scales losses as float16 has them scaled on CUDA, and computes in float32."""
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(
        torch.amp, "GradScaler",
        lambda device, enabled: scaler(device, init_scale=2.0**10, growth_interval=3),
    )  # fmt: skip


@pytest.mark.usefixtures("scaled")
def test_a_scaled_run_learns_the_same_skips_what_overflows_and_goes_on_exactly(
    begin: Callable[..., train.Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = begin("whole")
    loss = train.Trainer.loss

    def overflowing(self: train.Trainer, *batch: Tensor) -> Tensor:
        return loss(self, *batch) * (math.inf if self.model.training and self.step == 5 else 1)

    monkeypatch.setattr(train.Trainer, "loss", overflowing)
    whole.train()
    assert [r["step"] for r in records_of(whole.run) if r.get("loss", 0) is None] == [6]
    # doubled after 3 good steps, halved by the bad one, doubled by every third of 18 good ones
    assert whole.scaler.get_scale() == 2.0**10 * 2 / 2 * 2**6
    stopped = begin("stopped")
    interrupt_after(stopped, 13, monkeypatch)
    stopped.train()
    resumed = train.resume(stopped.run)
    assert resumed.scaler.get_scale() == stopped.scaler.get_scale() != 2.0**10
    resumed.train()
    assert records_of(resumed.run) == records_of(whole.run)
    assert_equal_tensors(resumed.tensors(), whole.tensors())


def test_the_average_of_the_weights_is_what_is_evaluated_and_kept(
    begin: Callable[..., train.Trainer],
) -> None:
    trainer = begin("run", ema=0.99)
    expected = {k: v.detach().double().clone() for k, v in trainer.model.named_parameters()}
    optimize = trainer.optimize

    def averaging() -> dict[str, float]:
        record = optimize()
        decay = min(0.99, (1 + trainer.step) / (10 + trainer.step))
        for name, parameter in trainer.model.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * parameter.detach().double()
        return record

    trainer.optimize = averaging  # type: ignore[method-assign]
    trainer.train()
    kept, _ = checkpoint.load_run(trainer.run)
    for name, parameter in kept.named_parameters():
        torch.testing.assert_close(parameter.double(), expected[name], rtol=1e-5, atol=1e-6)
        assert not torch.equal(parameter, trainer.model.get_parameter(name))
    plain = begin("plain")
    plain.train()
    assert_equal_tensors(dict(plain.model.state_dict()), dict(trainer.model.state_dict()))
    assert plain.evaluate() != trainer.evaluate()


def test_gradients_are_clipped(begin: Callable[..., train.Trainer]) -> None:
    trainer = begin("run", clip_norm=0.01)
    assert trainer.optimize()["gradient_norm"] > 0.01
    averages = [trainer.optimizer.state[p]["exp_avg"] for p in trainer.model.parameters()]
    norm = math.sqrt(sum(average.square().sum().item() for average in averages))
    assert norm == pytest.approx((1 - trainer.options.beta1) * 0.01, rel=1e-3)


def test_a_seed_gives_the_same_run_and_another_seed_another(
    begin: Callable[..., train.Trainer],
) -> None:
    losses = [begin(str(i), seed=seed).optimize()["loss"] for i, seed in enumerate((3, 3, 4))]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be above 0, got 0"),
        ({"batch_size": -1}, "batch_size must be above 0, got -1"),
        ({"learning_rate": math.nan}, "learning_rate must be above 0, got nan"),
        ({"warmup_steps": -1}, "warmup_steps must not be negative, got -1"),
        ({"beta2": 1.0}, "beta2 must be at least 0 and below 1, got 1.0"),
        ({"seed": 2**64}, "seed must be from "),
        ({"device": "abacus"}, "device 'abacus' can't be used"),
    ],
)
def test_options_that_make_no_run_leave_no_folder(
    begin: Callable[..., train.Trainer], tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        begin("run", **options)
    assert not (tmp_path / "run").exists()


def test_without_a_terminal_lines_tell_of_progress(
    begin: Callable[..., train.Trainer], capsys: pytest.CaptureFixture[str]
) -> None:
    begin("run").train()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("step 4/24  loss ")
    assert lines[0].endswith(" s left")
    assert lines[2].startswith("step 8/24  validation loss ")
    assert len(lines) == 24 // 4 + 24 // 8
