"""Continuous batching: one thread that writes all sequences together, a chunk of tokens at a time.

Between chunks sequences join and leave. A sequence's tokens depend on its prompt, its sampling and
its generator alone, for so do the engine's. The thread hands out each chunk's tokens at once, to
the event loop, and never waits for a reader.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch

from gpt_ext.sequences import Group, Sampling, Slots


@dataclass(frozen=True)
class TokenLogprobs:
    """Of a token drawn: its log-probability at temperature 1, and the likeliest tokens' ones."""

    drawn: float
    likeliest: list[tuple[int, float]]


@dataclass(frozen=True)
class Progress:
    """What a chunk brought a sequence: tokens, and why it ended: "stop", "length" or "error"."""

    tokens: list[int]
    logprobs: list[TokenLogprobs]
    finish: str | None


@dataclass(eq=False)
class Ticket:
    """A sequence that waits or is written; `deliver` is called in the event loop."""

    prompt: Sequence[int]
    new: int  # tokens still to draw, at least 1
    sampling: Sampling
    generator: torch.Generator
    logprobs: int | None  # how many of the likeliest are wanted with each token
    deliver: Callable[[Progress], None]
    cancelled: bool = field(default=False, init=False)


class FullError(Exception):
    """So many sequences wait already that these may not."""


class ClosingError(Exception):
    """Nothing new is begun any more."""


class Scheduler:
    """Writes the sequences of `submit` on `slots`; at most `queue` of them wait."""

    def __init__(self, slots: Slots, queue: int) -> None:
        self.slots, self.queue = slots, queue
        self.count = len(slots.texts)
        self.waiting: deque[Ticket] = deque()
        self.running: dict[Ticket, Group] = {}
        self.closing = self._ended = False
        self._changed = threading.Condition()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """From the event loop that progress is to be told in."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def submit(self, tickets: Sequence[Ticket]) -> None:
        """Puts all of them into the queue, or raises FullError or ClosingError."""
        with self._changed:
            if self.closing:
                raise ClosingError
            free = self.count - len(self.running)
            if len(self.waiting) + len(tickets) > free + self.queue:
                raise FullError
            self.waiting.extend(tickets)
            self._changed.notify()

    def cancel(self, tickets: Iterable[Ticket]) -> None:
        """Lets go of them: at the end of the present chunk at the latest their slots are free."""
        with self._changed:
            for ticket in tickets:
                ticket.cancelled = True
            self.waiting = deque(t for t in self.waiting if not t.cancelled)
            self._changed.notify()

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running

    def end(self) -> None:
        """Lets the thread end: what still waits or is written does so with an error."""
        with self._changed:
            self.closing = self._ended = True
            self._changed.notify()

    def stop(self) -> None:
        """Ends the thread, and waits for that."""
        self.end()
        self._thread.join()

    def _run(self) -> None:
        while self._settle():
            if self.running:
                try:
                    self._tell(self._chunk())
                except RuntimeError:  # logits that are not finite: the weights are damaged
                    self._give_up()
        self._give_up()

    def _settle(self) -> bool:
        """Waits for something to do, then lets sequences leave and join; False at the end."""
        with self._changed:
            while not (self.waiting or self.running or self._ended):
                self._changed.wait()
            for ticket in [t for t in self.running if t.cancelled]:
                self._leave(ticket)
            while self.waiting and len(self.running) < self.count:
                ticket = self.waiting.popleft()
                self.running[ticket] = self.slots.join(
                    [ticket.prompt], ticket.sampling, ticket.generator
                )
            return not self._ended

    def _chunk(self) -> list[tuple[Ticket, Progress]]:
        """Draws a chunk; a token at a time while somebody wants to know of other tokens."""
        order = list(self.slots.going)
        one = any(ticket.logprobs is not None for ticket in self.running)
        most = 1 if one else min(ticket.new for ticket in self.running)
        drawn = self.slots.next_chunk(most).T.tolist()
        told = []
        for ticket, group in list(self.running.items()):
            slot = group.slots.start
            tokens = [token for token in drawn[slot] if token >= 0]
            logprobs = []
            if ticket.logprobs is not None:
                logprobs = [self._logprobs(order.index(slot), tokens[0], ticket.logprobs)]
            ticket.new -= len(tokens)
            finish = "length" if ticket.new == 0 else None
            if slot not in self.slots.going:
                finish = "stop"
            if finish:
                with self._changed:
                    self._leave(ticket)
            told.append((ticket, Progress(tokens, logprobs, finish)))
        return told

    def _logprobs(self, row: int, token: int, count: int) -> TokenLogprobs:
        vocab = self.slots.engine.config.vocab_size
        logprobs = self.slots.logits[row, :vocab].log_softmax(0)
        top = logprobs.topk(min(count, vocab))
        likeliest = list(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        return TokenLogprobs(float(logprobs[token]), likeliest)

    def _leave(self, ticket: Ticket) -> None:
        self.slots.leave(self.running.pop(ticket))

    def _give_up(self) -> None:
        with self._changed:
            tickets = [*self.running, *self.waiting]
            for ticket in list(self.running):
                self._leave(ticket)
            self.waiting.clear()
        self._tell([(ticket, Progress([], [], "error")) for ticket in tickets])

    def _tell(self, told: list[tuple[Ticket, Progress]]) -> None:
        """One call into the event loop for everybody's tokens."""
        if self._loop is not None and told:
            self._loop.call_soon_threadsafe(deliver_all, told)
        time.sleep(0)  # the interpreter's lock goes to the event loop


def deliver_all(told: list[tuple[Ticket, Progress]]) -> None:
    for ticket, progress in told:
        if not ticket.cancelled:
            ticket.deliver(progress)
