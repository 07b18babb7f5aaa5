"""Small training runs, and what is asked of those that were stopped."""

from __future__ import annotations

import dataclasses
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gpt_ext import checkpoint, train
from gpt_ext.options import ModelOptions, TrainOptions

MODEL = ModelOptions(context_length=16, model_dim=16, num_blocks=2, num_heads=2, dropout=0.1)
TRAIN: dict[str, Any] = dict(
    steps=24, batch_size=4, warmup_steps=4, eval_every=8, eval_batches=2, log_every=4
)


def begin_run(text: Path, name: str, dropout: float = 0.1, **options: Any) -> train.Trainer:
    """A small run on a text, in the folder of that name beside it."""
    model = dataclasses.replace(MODEL, dropout=dropout)
    return train.start(text, text.parent / name, model, TrainOptions(**TRAIN | options))


def records_of(run: Path) -> list[dict[str, Any]]:
    """The records of a run without their timings: what must not depend on a stop."""
    records = checkpoint.read_lines(run / checkpoint.METRICS)
    for record in records:
        record.pop("tokens_per_second", None)
    return records


def assert_equal_tensors(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [key for key in one if not torch.equal(one[key], other[key])] == []


def interrupt_after(trainer: train.Trainer, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Presses Ctrl-C during the given step of a trainer."""
    optimize = trainer.optimize

    def pressing() -> dict[str, float]:
        record = optimize()
        if trainer.step == step:
            signal.raise_signal(signal.SIGINT)
        return record

    monkeypatch.setattr(trainer, "optimize", pressing)
