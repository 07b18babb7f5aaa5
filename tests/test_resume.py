"""Going on after a stop, as if there was none."""

from __future__ import annotations

import dataclasses
import json
import random
import signal
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import child
import pytest
import torch
from corpus import sentences
from runs import MODEL, TRAIN, assert_equal_tensors, interrupt_after, records_of

from gpt_ext import checkpoint, state, train
from gpt_ext.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")

ALL = {"ema": 0.9, "micro_batch_size": 2, "recompute": True, "precision": "bfloat16"}


@pytest.mark.parametrize(("step", "options"), [(3, {}), (8, {}), (13, {}), (13, ALL)])
def test_an_interrupted_run_goes_on_as_if_never_stopped(
    begin: Callable[..., train.Trainer],
    monkeypatch: pytest.MonkeyPatch,
    step: int,
    options: dict[str, Any],
) -> None:
    whole = begin("whole", **options)
    assert whole.train()
    stopped = begin("stopped", **options)
    interrupt_after(stopped, step, monkeypatch)
    assert not stopped.train()
    assert stopped.step == stopped.saved == step
    torch.manual_seed(999)
    resumed = train.resume(stopped.run)
    assert resumed.step == step
    assert resumed.train()
    assert records_of(stopped.run) == records_of(whole.run)
    assert_equal_tensors(resumed.tensors(), whole.tensors())
    for name in (checkpoint.BEST, checkpoint.LAST):
        assert (stopped.run / name).read_bytes() == (whole.run / name).read_bytes()


def forget_tensors(prefix: str) -> Callable[..., None]:
    """A way to resume that leaves some tensors of the state as a fresh run has them."""

    def forget(resumed: train.Trainer, fresh: train.Trainer) -> None:
        kept = fresh.tensors()
        for name, tensor in resumed.tensors().items():
            if name.startswith(prefix):
                tensor.copy_(kept[name])

    return forget


def forget_position(resumed: train.Trainer, fresh: train.Trainer) -> None:
    pieces = resumed.pieces
    resumed.pieces = lambda windows, number: pieces(windows, max(0, number - 13))  # type: ignore


def forget_dropout(resumed: train.Trainer, fresh: train.Trainer) -> None:
    resumed.options = dataclasses.replace(resumed.options, seed=1)


def forget_schedule(resumed: train.Trainer, fresh: train.Trainer) -> None:
    resumed.options = dataclasses.replace(resumed.options, steps=25)


@pytest.mark.parametrize(
    "forget",
    [
        *(forget_tensors(prefix) for prefix in ("model.", "optimizer.", "average.")),
        forget_position,
        forget_dropout,
        forget_schedule,
    ],
    ids=["model", "optimizer", "average", "position", "dropout", "schedule"],
)
def test_each_part_of_the_state_is_needed(
    begin: Callable[..., train.Trainer],
    monkeypatch: pytest.MonkeyPatch,
    forget: Callable[[train.Trainer, train.Trainer], None],
) -> None:
    whole = begin("whole", ema=0.9)
    whole.train()
    stopped = begin("stopped", ema=0.9)
    interrupt_after(stopped, 13, monkeypatch)
    stopped.train()
    resumed = train.resume(stopped.run)
    with torch.no_grad():
        forget(resumed, begin("fresh", ema=0.9))
    resumed.train()
    mine, wholes = records_of(stopped.run), records_of(whole.run)
    assert [r for r in mine if r["step"] <= 13] == [r for r in wholes if r["step"] <= 13]
    assert [r for r in mine if r["step"] > 13] != [r for r in wholes if r["step"] > 13]


def test_a_run_goes_on_with_another_number_of_threads(
    begin: Callable[..., train.Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = begin("whole")
    whole.train()
    stopped = begin("stopped")
    interrupt_after(stopped, 13, monkeypatch)
    stopped.train()
    torch.set_num_threads(3)
    resumed = train.resume(stopped.run)
    resumed.train()
    assert_equal_tensors(resumed.tensors(), whole.tensors())


def test_killed_at_any_moment_a_run_loses_no_checkpoint_and_ends_as_if_never_stopped(
    begin: Callable[..., train.Trainer], text: Path, tmp_path: Path
) -> None:
    run, draw = tmp_path / "killed", random.Random(0)
    options = {"steps": 60, "eval_every": 1, "eval_batches": 1, "keep_last": 2}
    words = [f"--{k.replace('_', '-')}={v}" for k, v in (asdict(MODEL) | TRAIN | options).items()]
    command = ["train", "--data", str(text), "--out", str(run), *words]
    for _ in range(8):
        before = state.steps(run)[-1:]
        process = child.start([word.replace("=True", "=true") for word in command])
        while state.steps(run)[-1:] <= before:
            assert process.is_alive()
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.1))  # a step and its checkpoint take about as long
        process.kill()
        process.join()
        assert len(state.steps(run)) in (1, 2, 3)  # the third, if killed before the first went
        command = ["train", "--resume", str(run)]
    assert child.run(command).returncode == 0
    whole = begin("whole", **options)
    whole.train()
    assert records_of(run) == records_of(whole.run)
    for name in (checkpoint.BEST, checkpoint.LAST):
        assert (run / name).read_bytes() == (whole.run / name).read_bytes()
    assert state.steps(run) == [59, 60]
    assert [path for path in run.rglob(".*.tmp")] == []


def test_a_second_interrupt_stops_at_once_and_the_handler_is_given_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    with train.on_interrupt() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.is_set()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_what_cannot_be_resumed_is_told(begin: Callable[..., train.Trainer], text: Path) -> None:
    trainer = begin("run")
    with pytest.raises(UserError, match="before its first checkpoint; remove it"):
        train.resume(trainer.run)
    trainer.train()
    with pytest.raises(UserError, match="has done all its 24 steps"):
        train.resume(trainer.run)
    text.write_text(sentences(2999))
    with pytest.raises(UserError, match=r"text\.txt has changed since the run"):
        train.resume(trainer.run)


def test_the_state_of_another_model_is_told(begin: Callable[..., train.Trainer]) -> None:
    trainer = begin("run")
    trainer.save()
    config = json.loads((trainer.run / checkpoint.CONFIG).read_text())
    config["model"]["model_dim"] = 32
    (trainer.run / checkpoint.CONFIG).write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"00000000 is damaged: .*Size mismatch"):
        train.resume(trainer.run)
