"""From a text file to a run: optimisation, evaluation, checkpoints, and going on after a stop."""

from __future__ import annotations

import hashlib
import math
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from gpt_ext import checkpoint, data
from gpt_ext.errors import UserError
from gpt_ext.model import GPT, GPTConfig
from gpt_ext.options import ModelOptions, TrainOptions
from gpt_ext.progress import Progress
from gpt_ext.tokenizer import CharTokenizer


def start(path: Path, run: Path, model: ModelOptions, train: TrainOptions) -> Trainer:
    """A new run on the text at `path`; UserError, and no folder, where there can be none."""
    text = data.read_text(path)
    tokenizer = CharTokenizer.from_text(text)
    try:
        GPTConfig(len(tokenizer), **asdict(model))
    except ValueError as error:
        raise UserError(str(error)) from None
    config = {
        "model": asdict(model),
        "vocabulary": tokenizer.vocabulary,
        "train": asdict(train),
        "data": str(path.resolve()),
        "data_sha256": hashlib.sha256(text.encode()).hexdigest(),
    }
    trainer = Trainer(run, config, text)
    checkpoint.create_run(run, config)
    return trainer


def resume(run: Path) -> Trainer:
    """The run as its last checkpoint left it: every later loss is that of a run never stopped."""
    config = checkpoint.read_config(run)
    text = data.read_text(Path(config["data"]))
    if hashlib.sha256(text.encode()).hexdigest() != config["data_sha256"]:
        raise UserError(f"{config['data']} has changed since the run in {run} began")
    trainer = Trainer(run, config, text)
    trainer.load()
    return trainer


class Trainer:
    """One run: its model, data, optimizer and step; `config` is the content of config.json."""

    def __init__(self, run: Path, config: Mapping[str, Any], text: str) -> None:
        self.run = run
        self.options = options = TrainOptions(**config["train"])
        try:
            self.device = torch.empty(0, device=options.device).device
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"device {options.device!r} can't be used: {error}") from None
        torch.manual_seed(options.seed)
        self.model, self.tokenizer = checkpoint.build_model(config)
        self.model.to(self.device)
        self.training, self.validation = data.split(
            self.tokenizer.encode(text), self.model.config.context_length
        )
        self.optimizer = build_optimizer(self.model, options)
        self.batches = torch.Generator().manual_seed(options.seed)
        self.step, self.saved, self.skipped, self.best_loss = 0, 0, 0, math.inf

    def train(self) -> bool:
        """Trains to the last step (True), or to the first Ctrl-C, which saves too (False).

        UserError where the disk is full or the loss stays without a finite value; the checkpoint
        before that is kept.
        """
        options, context_length = self.options, self.model.config.context_length
        self.model.train()
        since, at = self.step, time.perf_counter()
        with (
            Progress(self.step, options.steps, options.log_every) as progress,
            on_interrupt() as stop,
        ):
            while self.step < options.steps and not stop.is_set():
                record = self.optimize()
                steps_per_second = (self.step - since) / (time.perf_counter() - at)
                tokens_per_second = steps_per_second * options.batch_size * context_length
                progress.step(self.step, record["loss"], tokens_per_second, steps_per_second)
                if self.skipped == options.max_skipped:
                    raise self.diverged(f"{self.skipped} steps in a row had no finite loss")
                if self.step % options.log_every == 0:
                    self.log(record | {"tokens_per_second": round(tokens_per_second)})
                if self.step % options.eval_every == 0 or self.step == options.steps:
                    loss = self.evaluate()
                    progress.say(f"step {self.step}/{options.steps}  validation loss {loss:.4f}")
                    self.log({"step": self.step, "validation_loss": loss})
                    if not math.isfinite(loss):
                        raise self.diverged("the validation loss is not finite")
                    self.save(loss)
                    since, at = self.step, time.perf_counter()
        finished = self.step == options.steps
        if not finished and not self.skipped:
            self.save()
        return finished

    def optimize(self) -> dict[str, float]:
        """One step of AdamW, left out if loss or gradients are not finite; what to log of it."""
        rate = learning_rate(self.step, self.options)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = self.model.loss(*self.batch(self.training, self.batches))
        self.optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.options.clip_norm)
        if loss.isfinite() and norm.isfinite():
            self.optimizer.step()
            self.skipped = 0
        else:
            self.skipped += 1
        self.step += 1
        return {
            "step": self.step,
            "loss": loss.item(),
            "learning_rate": rate,
            "gradient_norm": norm.item(),
        }

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean loss on validation batches, the same ones each time."""
        batches = torch.Generator().manual_seed(self.options.seed)
        self.model.eval()
        losses = [
            self.model.loss(*self.batch(self.validation, batches)).item()
            for _ in range(self.options.eval_batches)
        ]
        self.model.train()
        return sum(losses) / len(losses)

    def batch(self, tokens: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x, y = data.random_batch(
            tokens, self.options.batch_size, self.model.config.context_length, generator
        )
        return x.to(self.device), y.to(self.device)

    def diverged(self, what: str) -> UserError:
        kept = f"the checkpoint of step {self.saved}" if self.saved else "no checkpoint"
        return UserError(
            f"{what}: stopped at step {self.step}, {self.run} keeps {kept}; "
            "a lower --learning-rate may help"
        )

    def log(self, record: Mapping[str, float]) -> None:
        """Adds a line to metrics.jsonl, with null for what is not finite."""
        finite = {key: value if math.isfinite(value) else None for key, value in record.items()}
        checkpoint.append_line(self.run / checkpoint.METRICS, finite)

    def save(self, validation_loss: float = math.inf) -> None:
        """Writes the last checkpoint, and the best one if there was no lower loss before."""
        if validation_loss < self.best_loss:
            self.best_loss = validation_loss
            checkpoint.save_weights(self.run / checkpoint.BEST, self.model)
        checkpoint.save_weights(self.run / checkpoint.LAST, self.model)
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "best_loss": self.best_loss,
            "batches": self.batches.get_state(),
            "dropout": torch.get_rng_state(),
        }
        if self.device.type == "cuda":
            state["dropout_cuda"] = torch.cuda.get_rng_state(self.device)
        checkpoint.save_state(self.run, state)
        self.saved = self.step

    def load(self) -> None:
        """Takes up what `save` wrote; UserError if that can't be, or if there is nothing to do."""
        state = checkpoint.load_state(self.run)
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step = self.saved = state["step"]
            self.best_loss = state["best_loss"]
            self.batches.set_state(state["batches"])
            torch.set_rng_state(state["dropout"])
            if self.device.type == "cuda":
                torch.cuda.set_rng_state(state["dropout_cuda"], self.device)
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(f"{self.run / checkpoint.STATE} is damaged: {error}") from None
        if self.step >= self.options.steps:
            raise UserError(f"{self.run} has done all its {self.step} steps")
        metrics = self.run / checkpoint.METRICS
        kept = [record for record in checkpoint.read_lines(metrics) if record["step"] <= self.step]
        checkpoint.write_whole(metrics, "".join(map(checkpoint.json_line, kept)).encode())


def build_optimizer(model: GPT, options: TrainOptions) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter, 2019) that decays the weights of linear layers alone."""
    linear = {module.weight for module in model.modules() if isinstance(module, nn.Linear)}
    groups: list[dict[str, Any]] = [
        {"params": [p for p in model.parameters() if p in linear]},
        {"params": [p for p in model.parameters() if p not in linear], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups,
        lr=options.learning_rate,
        betas=(options.beta1, options.beta2),
        weight_decay=options.weight_decay,
        fused=True,
    )


def learning_rate(step: int, options: TrainOptions) -> float:
    """Linear warmup to the peak, then half a cosine down to final_learning_rate."""
    peak, final, warmup = options.learning_rate, options.final_learning_rate, options.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, options.steps - warmup)
    return final + (peak - final) * (1 + math.cos(math.pi * done)) / 2


@contextmanager
def on_interrupt() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets; the second one raises KeyboardInterrupt as ever."""
    stop = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
