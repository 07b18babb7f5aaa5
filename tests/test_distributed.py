"""Several processes train what one trains: the command line in processes that share a job."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import child
import pytest
import torch
from corpus import sentences
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from gpt_ext import GPT, checkpoint, state, train
from gpt_ext.distributed import World, syncs, whole
from gpt_ext.options import ModelOptions, TrainOptions
from gpt_ext.train import Objective

MODEL = ModelOptions(context_length=16, model_dim=16, num_blocks=2, num_heads=2)
TRAIN: dict[str, Any] = dict(
    steps=12, batch_size=8, warmup_steps=2, eval_every=6, eval_batches=2, log_every=1
)
OPTIONS = [
    *("--context-length", "16", "--model-dim", "16", "--num-blocks", "2", "--num-heads", "2"),
    *("--batch-size", "8", "--warmup-steps", "2", "--eval-batches", "2"),
]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text(sentences(3000))
    return path


def by_one(text: Path, run: Path, **options: Any) -> train.Trainer:
    """What one process makes of it."""
    torch.set_num_threads(1)
    trainer = train.start(text, run, MODEL, TrainOptions(**TRAIN | options))
    assert trainer.train()
    return trainer


def assert_same_training(run: Path, other: Path, after: int = 0) -> None:
    """The records of two runs after a step, and their weights, agree within rounding.

    A sum over processes adds in another order than one process does, and where a gradient is all
    but zero AdamW makes a whole step of the difference: so weights are compared by their norm.
    """
    records, others = (
        [r for r in checkpoint.read_lines(path / checkpoint.METRICS) if r["step"] > after]
        for path in (run, other)
    )
    assert [r.keys() for r in records] == [r.keys() for r in others]
    for record, expected in zip(records, others, strict=True):
        for key in record.keys() - {"tokens_per_second"}:
            assert record[key] == pytest.approx(expected[key], rel=2e-5), (record["step"], key)
    weights, expected = (
        torch.cat([weight.flatten() for weight in checkpoint.load_run(path)[0].parameters()])
        for path in (run, other)
    )
    assert (weights - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize(
    ("processes", "options"),
    [
        (2, ["--micro-batch-size", "2"]),
        (2, ["--micro-batch-size", "2", "--parallel", "fsdp", "--ema", "0.9"]),
        (4, ["--parallel", "fsdp", "--recompute", "true"]),
    ],
)
def test_processes_together_train_as_one_alone(
    text: Path, tmp_path: Path, processes: int, options: list[str]
) -> None:
    by_one(text, tmp_path / "one", ema=0.9 if "--ema" in options else 0.0)
    command = ["train", "--data", str(text), "--out", str(tmp_path / "run"), *OPTIONS, *options]
    command += ["--steps", "12", "--eval-every", "6", "--log-every", "1"]
    results = child.run_job(processes, command)
    assert [(r.returncode, r.stderr) for r in results] == [(0, "")] * processes
    assert "step 12/12  validation loss" in results[0].stdout
    assert all(result.stdout == "" for result in results[1:])
    assert_same_training(tmp_path / "run", tmp_path / "one")


@pytest.fixture(scope="module")
def killed(
    text: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A run of torchrun's, whose second process was killed after a checkpoint; what it printed."""
    run = tmp_path_factory.mktemp("killed") / "run"
    train = ["-m", "gpt_ext", "train", "--data", text, "--out", run, *OPTIONS]
    train += ["--steps", "1000000", "--eval-every", "6", "--log-every", "1", "--parallel", "fsdp"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    with subprocess.Popen(
        [*torchrun, *map(str, train)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step 8/"):
                break
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        environments = {int(pid): Path(f"/proc/{pid}/environ").read_text() for pid in children}
        os.kill(next(p for p, e in environments.items() if "\0RANK=1\0" in e), signal.SIGKILL)
        stdout, stderr = process.communicate(timeout=60)
    return run, subprocess.CompletedProcess(train, process.returncode, stdout, stderr)


def test_a_killed_process_ends_the_job_and_the_first_says_how_to_go_on(
    killed: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    run, result = killed
    assert result.returncode != 0
    told = "another process of the job is gone; to go on: gpt-ext train --resume"
    assert re.search(rf"^gpt-ext: error: {told} {run}$", result.stderr, re.MULTILINE)
    assert state.steps(run)


@pytest.mark.parametrize("processes", [1, 4])
def test_a_run_goes_on_with_another_number_of_processes(
    killed: tuple[Path, subprocess.CompletedProcess[str]],
    text: Path,
    tmp_path: Path,
    processes: int,
) -> None:
    """Its options say a million steps: here they end soon, and so does the one of comparison."""
    saved, run = state.steps(killed[0])[-1], tmp_path / "run"
    subprocess.run(["cp", "-r", killed[0], run], check=True)
    config = json.loads((run / checkpoint.CONFIG).read_text())
    config["train"]["steps"] = saved + 4
    (run / checkpoint.CONFIG).write_text(json.dumps(config))
    results = child.run_job(processes, ["train", "--resume", str(run)])
    assert [(r.returncode, r.stderr) for r in results] == [(0, "")] * processes
    assert f"step {saved + 1}/{saved + 4}  loss" in results[0].stdout
    whole = train.start(text, tmp_path / "one", MODEL, TrainOptions(**TRAIN | {"steps": 1_000_000}))
    while whole.step < saved:
        whole.optimize()
    whole.options = TrainOptions(**config["train"] | {"parallel": "ddp"})
    whole.train()
    assert_same_training(run, tmp_path / "one", after=saved)


def test_no_two_processes_read_the_same_tokens(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(World, "spread", lambda self, objective, *_: objective)
    monkeypatch.setattr(World, "first", lambda self, do: do())
    options = TrainOptions(**TRAIN | {"micro_batch_size": 1})
    trainers = []
    for rank in range(4):
        world = World()
        world.rank, world.size = rank, 4
        trainers.append(train.start(text, tmp_path / str(rank), MODEL, options, world))
    windows = trainers[0].training
    windows.tokens = torch.arange(len(windows.tokens))  # a token is its place
    for trainer in trainers:
        trainer.training = windows
    steps = windows.count // options.batch_size  # those of the first epoch alone
    read = [
        [x for step in range(steps) for x, _ in trainer.pieces(windows, step)]
        for trainer in trainers
    ]
    assert [len(mine) for mine in read] == [2 * steps] * 4
    places = torch.cat([x for mine in read for x in mine]).flatten()
    assert len(places.unique()) == len(places) == steps * options.batch_size * 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch-size", "7"], "batch_size must be a multiple of the 2 processes, got 7"),
        (
            ["--micro-batch-size", "3"],
            "micro_batch_size must divide the 4 sequences of a process, got 3",
        ),
    ],
)
def test_what_cannot_be_shared_is_told_once(
    text: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    command = ["train", "--data", str(text), "--out", str(tmp_path / "run"), *OPTIONS, *options]
    results = child.run_job(2, command)
    assert [result.returncode for result in results] == [2, 2]
    assert [result.stderr for result in results] == [f"gpt-ext: error: {message}\n", ""]
    assert not (tmp_path / "run").exists()


def test_a_run_that_exists_is_told_once(
    killed: tuple[Path, subprocess.CompletedProcess[str]], text: Path
) -> None:
    run, _ = killed
    results = child.run_job(2, ["train", "--data", str(text), "--out", str(run), *OPTIONS])
    assert [result.returncode for result in results] == [2, 2]
    assert f"{run} exists already" in results[0].stderr
    assert results[1].stderr == ""


@pytest.fixture
def group(tmp_path: Path) -> Iterator[World]:
    """A job of one process, which knows no better than to ask the others."""
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    world = World()
    yield world
    distributed.destroy_process_group()


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_gradients_are_exchanged_once_a_step_and_summed_meanwhile(
    group: World, monkeypatch: pytest.MonkeyPatch, parallel: Any
) -> None:
    model, plain = (GPT(7, 8, 16, 2, 2, dropout=0.0) for _ in range(2))
    plain.load_state_dict(model.state_dict())
    mesh = distributed.init_device_mesh("cpu", (1,))
    with monkeypatch.context() as patch:
        patch.setattr(group, "size", 2)  # or nothing would be wrapped
        patch.setattr(distributed, "init_device_mesh", lambda *_: mesh)
        module = group.spread(Objective(model), model.blocks, parallel)
    exchanged = []
    if isinstance(module, DistributedDataParallel):

        def noting(_, bucket):  # torch reads annotations, and wants no text there
            exchanged.append(number)
            done = torch.futures.Future()
            done.set_result(bucket.buffer())
            return done

        module.register_comm_hook(None, noting)
    for number in range(3):
        tokens = torch.randint(7, (4, 9))
        syncs(module, number == 2)
        module(tokens[:, :-1], tokens[:, 1:]).backward()
        plain.loss(tokens[:, :-1], tokens[:, 1:]).backward()
        if parallel == "fsdp" and all(p.grad is not None for p in model.parameters()):
            exchanged.append(number)  # a share of a gradient is there when it has been
    assert set(exchanged) == {2}
    expected = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(whole(parameter.grad), expected[name].grad, msg=name)
