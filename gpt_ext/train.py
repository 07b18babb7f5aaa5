"""From a data set to a run: optimisation, evaluation, checkpoints, and going on after a stop."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from itertools import chain
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from gpt_ext import checkpoint, state
from gpt_ext.cuda_graph import Replayed
from gpt_ext.data import DataSet, open_dataset
from gpt_ext.distributed import World, syncs, whole
from gpt_ext.errors import UserError
from gpt_ext.model import GPT, GPTConfig
from gpt_ext.optimizer import (
    Average,
    build_optimizer,
    clipped_step,
    learning_rate,
    set_learning_rate,
)
from gpt_ext.options import ModelOptions, TrainOptions
from gpt_ext.progress import Progress, board, summary_writer
from gpt_ext.sampling import Windows, derived_seed


def start(
    path: Path, run: Path, model: ModelOptions, train: TrainOptions, world: World | None = None
) -> Trainer:
    """A new run on the data at `path`; UserError, and no folder, where there can be none."""
    data = open_dataset(path)
    try:
        GPTConfig(len(data.tokenizer), **asdict(model))
    except ValueError as error:
        raise UserError(str(error)) from None
    config = {
        "model": asdict(model),
        "vocab_size": len(data.tokenizer),
        "train": asdict(train),
        "data": str(path.resolve()),
        "data_sha256": data.sha256,
    }
    trainer = Trainer(run, config, data, world or World(train.device))
    trainer.world.first(lambda: checkpoint.create_run(run, config, data.tokenizer))
    return trainer


def resume(run: Path, world: World | None = None) -> Trainer:
    """The run as its last checkpoint left it: every later loss is that of a run never stopped."""
    config = checkpoint.read_config(run)
    data = open_dataset(Path(config["data"]))
    if data.sha256 != config["data_sha256"]:
        raise UserError(f"{config['data']} has changed since the run in {run} began")
    trainer = Trainer(run, config, data, world or World(config["train"]["device"]))
    trainer.load()
    return trainer


class Objective(nn.Module):
    """The loss of a model as a module, which is what data-parallel wrappers take."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return self.model.loss(tokens, targets)


class Trainer:
    """One run: its model, data, optimizer and step; `config` is the content of config.json."""

    def __init__(self, run: Path, config: Mapping[str, Any], data: DataSet, world: World) -> None:
        self.run, self.data, self.world, self.device = run, data, world, world.device
        self.options = options = TrainOptions(**config["train"])
        self.share, self.micro = shares(options, world.size)
        if options.precision == "float16" and self.device.type == "cpu":
            raise UserError("precision float16 has no kernels for CPUs: take bfloat16, or CUDA")
        if options.cuda_graph:
            check_capture(options, world)
        if options.tensorboard:
            summary_writer()  # or says that there is none
        torch.manual_seed(options.seed)
        self.model = GPT(config["vocab_size"], **config["model"]).to(self.device)
        length = self.model.config.context_length
        data.check_lengths(length)
        self.training = Windows(data.training, length, options.seed)
        self.validation = Windows(data.validation, length, options.seed)
        for block in self.model.blocks:
            if options.compile:
                block.forward = torch.compile(block.forward)
            if options.recompute:
                block.forward = partial(recompute, block.forward, use_reentrant=False)
        self.objective = world.spread(Objective(self.model), self.model.blocks, options.parallel)
        self.optimizer = build_optimizer(self.model, options)
        self.advance: Callable[..., tuple[Tensor, ...]] = self.take_step
        if options.cuda_graph:
            self.advance = Replayed(self.take_step, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=options.precision == "float16")
        self.average = Average(self.model, options.ema) if options.ema else None
        self.step, self.saved, self.skipped, self.best_loss = 0, 0, 0, math.inf

    def train(self) -> bool:
        """Trains to the last step (True), or to Ctrl-C or SIGTERM, which save too (False).

        As they do, whoever closes the other end of the output.

        UserError where the disk is full or the loss stays without a finite value; the checkpoint
        before that is kept.
        """
        options, context_length = self.options, self.model.config.context_length
        self.model.train()
        since, at = self.step, time.perf_counter()
        wanted = options.tensorboard and self.world.rank == 0
        with (
            Progress(self.step, options.steps, options.log_every) as progress,
            on_interrupt(repeated=self.world.size > 1) as stop,
            board(self.run if wanted else None, self.step) as self.board,
        ):
            while self.step < options.steps and not self.world.any(
                stop.is_set() or progress.unheard
            ):
                record = self.optimize()
                steps_per_second = (self.step - since) / (time.perf_counter() - at)
                tokens_per_second = steps_per_second * options.batch_size * context_length
                progress.step(self.step, record["loss"], tokens_per_second, steps_per_second)
                if self.step % options.log_every == 0 or self.skipped:
                    self.log(record | {"tokens_per_second": round(tokens_per_second)})
                if self.skipped == options.max_skipped:
                    raise self.diverged(f"{self.skipped} steps in a row had no finite loss")
                if self.step % options.eval_every == 0 or self.step == options.steps:
                    loss = self.evaluate()
                    progress.say(f"step {self.step}/{options.steps}  validation loss {loss:.4f}")
                    self.log({"step": self.step, "validation_loss": loss})
                    if not math.isfinite(loss):
                        raise self.diverged("the validation loss is not finite")
                    self.save(loss)
                    since, at = self.step, time.perf_counter()
        finished = self.step == options.steps
        if not finished and not self.skipped and self.saved != self.step:
            self.save()
        return finished

    def optimize(self) -> dict[str, float]:
        """One step of AdamW, left out if loss or gradients are not finite; what to log of it."""
        rate = learning_rate(self.step, self.options)
        set_learning_rate(self.optimizer, rate)
        torch.manual_seed(derived_seed(self.options.seed, self.step, self.world.rank))  # dropout
        pieces = self.pieces(self.training, self.step)
        loss, norm = torch.stack(self.advance(*chain.from_iterable(pieces))).tolist()
        self.step += 1
        if math.isfinite(loss) and math.isfinite(norm):
            self.skipped = 0
            if self.average is not None:
                self.average.update(self.step)
        else:
            self.skipped += 1
        return {"step": self.step, "loss": loss, "learning_rate": rate, "gradient_norm": norm}

    def take_step(self, *pieces: Tensor) -> tuple[Tensor, Tensor]:
        """A step on tokens and targets (B, T) in turn: mean loss and norm of the gradients.

        It asks the device for nothing, so that it can be captured: where one of the two is not
        finite, AdamW leaves weights and moments as they are.
        """
        self.optimizer.zero_grad()
        total = torch.zeros((), device=self.device)
        number = len(pieces) // 2
        for n in range(number):
            syncs(self.objective, n == number - 1)
            loss = self.loss(pieces[2 * n], pieces[2 * n + 1]) / number
            self.scaler.scale(loss).backward()
            total += loss.detach()
        self.scaler.unscale_(self.optimizer)
        total = self.world.mean(total)
        norm = clipped_step(self.optimizer, total, self.options.clip_norm)
        self.scaler.update()
        return total, norm

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean loss on validation batches, the same ones each time; of the average, if any."""
        self.model.eval()
        with self.average.in_place() if self.average else nullcontext():
            losses = [
                self.loss(x, y).float()
                for number in range(self.options.eval_batches)
                for x, y in self.pieces(self.validation, number)
            ]
        self.model.train()
        return self.world.mean(torch.stack(losses).mean()).item()

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of sequences (B, T), in the run's precision."""
        dtype = getattr(torch, self.options.precision)
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            loss: Tensor = self.objective(tokens.to(self.device), targets.to(self.device))
        return loss

    def pieces(self, windows: Windows, number: int) -> list[tuple[Tensor, Tensor]]:
        """This process's share of batch `number`, in what it computes at once."""
        first = number * self.options.batch_size + self.world.rank * self.share
        x, y = windows.batch(first, self.share)
        return list(zip(x.split(self.micro), y.split(self.micro), strict=True))

    def diverged(self, what: str) -> UserError:
        kept = f"the checkpoint of step {self.saved}" if self.saved else "no checkpoint"
        return UserError(
            f"{what}: stopped at step {self.step}, {self.run} keeps {kept}; "
            "a lower --learning-rate may help"
        )

    def log(self, record: Mapping[str, float]) -> None:
        """Adds a line to metrics.jsonl, with null for what is not finite; tells the board."""
        finite = {key: value if math.isfinite(value) else None for key, value in record.items()}
        self.world.first(lambda: checkpoint.append_line(self.run / checkpoint.METRICS, finite))
        self.board(record)

    def save(self, validation_loss: float = math.inf) -> None:
        """Writes a checkpoint, the last weights, and the best ones if no loss was lower before."""
        names = [checkpoint.LAST]
        if validation_loss < self.best_loss:
            self.best_loss = validation_loss
            names.insert(0, checkpoint.BEST)
        with self.average.in_place() if self.average else nullcontext():
            weights = {k: whole(v) for k, v in self.model.state_dict().items()}
            for name in names:
                self.world.first(partial(checkpoint.save_weights, self.run / name, weights))
        state.save(self.run, self.step, self.tensors(), self.world, self.options.keep_last)
        self.saved = self.step

    def load(self) -> None:
        """Takes up what `save` wrote; UserError if that can't be, or if there is nothing to do."""
        self.world.first(lambda: state.clean(self.run))
        tensors = self.tensors()
        state.load(self.run, tensors, self.world)
        self.step, self.skipped = tensors["progress"].tolist()
        self.saved, self.best_loss = self.step, tensors["best_loss"].item()
        if self.scaler.is_enabled():
            scale, growth = tensors["scaler"].tolist()
            kept = {"scale": scale, "_growth_tracker": int(growth)}
            self.scaler.load_state_dict(self.scaler.state_dict() | kept)
        if self.step >= self.options.steps:
            raise UserError(f"{self.run} has done all its {self.step} steps")
        self.world.first(self._forget_later_records)

    def tensors(self) -> dict[str, Tensor]:
        """All that going on takes: what is trained itself, and copies of the numbers beside it."""
        tensors = {
            "progress": torch.tensor([self.step, self.skipped]),
            "best_loss": torch.tensor(self.best_loss, dtype=torch.float64),
        }
        for name, parameter in self.model.named_parameters():
            tensors[f"model.{name}"] = parameter.detach()
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{name}.{key}"] = value
            if self.average is not None:
                tensors[f"average.{name}"] = self.average.weights[name]
        if self.scaler.is_enabled():
            kept = self.scaler.state_dict()
            tensors["scaler"] = torch.tensor(
                [kept["scale"], kept["_growth_tracker"]], dtype=torch.float64
            )
        return tensors

    def _forget_later_records(self) -> None:
        metrics = self.run / checkpoint.METRICS
        kept = [record for record in checkpoint.read_lines(metrics) if record["step"] <= self.step]
        checkpoint.write_whole(metrics, "".join(map(checkpoint.json_line, kept)).encode())


def check_capture(options: TrainOptions, world: World) -> None:
    """UserError where a step can't be captured in a CUDA graph."""
    if world.device.type != "cuda":
        raise UserError(f"cuda_graph needs a CUDA device, got device {options.device}")
    if world.size > 1:
        raise UserError(f"cuda_graph is for a single process, got {world.size}")
    if options.recompute:
        raise UserError("cuda_graph and recompute exclude each other: take one of them")


def shares(options: TrainOptions, processes: int) -> tuple[int, int]:
    """Sequences of a step for each process, and at once; UserError where they don't add up."""
    share, left = divmod(options.batch_size, processes)
    if left:
        raise UserError(
            f"batch_size must be a multiple of the {processes} processes, got {options.batch_size}"
        )
    micro = options.micro_batch_size or share
    if share % micro:
        raise UserError(
            f"micro_batch_size must divide the {share} sequences of a process, got {micro}"
        )
    return share, micro


@contextmanager
def on_interrupt(repeated: bool = False) -> Iterator[threading.Event]:
    """An event that the first Ctrl-C or SIGTERM sets; the second raises KeyboardInterrupt.

    Not where they come `repeated`: torchrun passes on what the terminal has sent already.
    """
    stop = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.is_set() and not repeated:
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
