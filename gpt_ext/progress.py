"""What long work shows: a bar on a terminal, lines elsewhere, and TensorBoard if asked for."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gpt_ext.errors import UserError


class Progress:
    """Shows steps from `first` to `total`; without a terminal, a line every `every` steps."""

    def __init__(self, first: int, total: int, every: int) -> None:
        from rich import progress
        from rich.console import Console

        self.total, self.every = total, every
        self.unheard = False  # whether nobody reads any more what is said
        self.terminal = sys.stdout.isatty()
        self.console = Console(highlight=False, markup=False, soft_wrap=True)
        self.bar = progress.Progress(
            progress.TextColumn("{task.completed}/{task.total}"),
            progress.BarColumn(),
            progress.TextColumn("loss {task.fields[loss]:.3f}"),
            progress.TextColumn("{task.fields[speed]:,.0f} tokens/s"),
            progress.TimeRemainingColumn(),
            progress.TextColumn("left"),
            console=self.console,
            disable=not self.terminal,
        )
        self.task = self.bar.add_task("train", completed=first, total=total, loss=0.0, speed=0.0)

    def __enter__(self) -> Progress:
        self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.stop()

    def step(
        self, step: int, loss: float, tokens_per_second: float, steps_per_second: float
    ) -> None:
        """Tells of step number `step`, just done."""
        self.bar.update(self.task, completed=step, loss=loss, speed=tokens_per_second)
        if not self.terminal and step % self.every == 0:
            left = (self.total - step) / steps_per_second
            self.say(
                f"step {step}/{self.total}  loss {loss:.4f}  "
                f"{tokens_per_second:,.0f} tokens/s  {left:.0f} s left"
            )

    def say(self, line: str) -> None:
        """Prints a line, above the bar where there is one."""
        try:
            self.console.print(line)
        except (BrokenPipeError, SystemExit):  # rich makes the one of the other
            self.unheard = True


class ByteProgress:
    """Shows how many of `total` bytes are done; without a terminal, a line every ten seconds."""

    def __init__(self, what: str, done: int, total: int) -> None:
        from rich import progress

        self.what, self.first, self.done, self.total = what, done, done, total
        self.since = self.told = time.monotonic()
        self.bar = progress.Progress(
            progress.TextColumn(what),
            progress.BarColumn(),
            progress.DownloadColumn(),
            progress.TransferSpeedColumn(),
            progress.TimeRemainingColumn(),
            progress.TextColumn("left"),
            disable=not sys.stdout.isatty(),
        )
        self.task = self.bar.add_task(what, completed=done, total=total)

    def __enter__(self) -> ByteProgress:
        self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.stop()

    def at(self, done: int) -> None:
        """Tells that so many bytes are done."""
        self.done, now = done, time.monotonic()
        self.bar.update(self.task, completed=done)
        if self.bar.disable and now - self.told >= 10:
            self.told, speed = now, (done - self.first) / (now - self.since)
            print(
                f"{self.what} {done / 1e6:,.0f} of {self.total / 1e6:,.0f} MB  "
                f"{speed / 1e6:,.0f} MB/s  {(self.total - done) / speed:.0f} s left",
                flush=True,
            )


@contextmanager
def board(run: Path | None, step: int) -> Iterator[Callable[[Mapping[str, float]], None]]:
    """A function that adds a record to RUN/tensorboard, where what comes after `step` is dropped.

    Without a run it does nothing.
    """
    if run is None:
        yield lambda record: None
        return
    with summary_writer()(str(run / "tensorboard"), purge_step=step + 1) as writer:

        def add(record: Mapping[str, float]) -> None:
            for key in record.keys() - {"step"}:
                writer.add_scalar(key, record[key], int(record["step"]))

        yield add


def summary_writer() -> Any:
    """TensorBoard's writer; UserError where it is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("no TensorBoard: pip install 'gpt-ext[tensorboard]'") from None
    return SummaryWriter
