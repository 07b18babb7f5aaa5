"""Sequences that the native engine writes together: its loop of calls, some tokens each."""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from gpt_ext.engine import CALL_SECONDS, Engine, interruptibly
from gpt_ext.ops import decode

# Work of one native call, some CALL_SECONDS on two cores with AVX2. A token is never less, and is
# drawn in a thread if it is more.
CALL_FLOPS = 2.5e9


@dataclass(frozen=True)
class Sampling:
    """How a sequence's tokens are drawn; the names are those of `GPT.stream`."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0


@dataclass
class Group:
    """Neighbouring slots that draw from one generator, and its states around the last chunk."""

    slots: range
    sampling: Sampling
    generator: torch.Generator
    states: tuple[Tensor, Tensor] | None = None  # before and after; None where nothing was drawn


class Slots:
    """Places for `count` sequences that are written together; each joins and leaves on its own.

    A text is what the next token sees, at most `window` tokens. Where a token has no room left, the
    text is cut to its last `window - stride` tokens and computed anew, for all positions shift;
    stride 0 so gives each token the whole window before it. No text that joins may grow beyond
    `positions` tokens, or `window` if that is less. A token of `stop` ends its sequence.
    """

    def __init__(
        self, engine: Engine, count: int, positions: int, window: int, stride: int,
        stop: Sequence[int] = (),
    ) -> None:  # fmt: skip
        config = engine.config
        self.engine, self.window, self.stride, self.stop = engine, window, stride, stop
        self.stop_ids = engine.packed.new_tensor(stop, dtype=torch.int64) if stop else None
        self.texts: list[list[int]] = [[] for _ in range(count)]
        self.cached = [0] * count
        self.groups: list[Group] = []
        self.going: list[int] = []  # slots whose sequences have not ended
        self.sampling = engine.packed.new_tensor([1, 0, 0, 1], dtype=torch.float64).repeat(count, 1)
        self.seen: Tensor | None = None  # (B, V), once a sequence has a repetition penalty
        self.logits = self._empty(0)  # (going, V') before the last token drawn
        self.row_flops = 24 * config.model_dim**2  # in a block
        self.pace = 1  # tokens that are drawn in about CALL_SECONDS
        self.slides = False  # whether each of them takes its whole window anew
        self.cache = decode.Cache.empty(
            config.num_blocks, count, config.num_heads, min(window, positions),
            config.model_dim // config.num_heads, engine.form,
        )  # fmt: skip

    def join(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, generator: torch.Generator
    ) -> Group:
        """Gives sequences that share a generator the first free slots that are neighbours."""
        taken = {slot for group in self.groups for slot in group.slots}
        starts = range(len(self.texts) - len(prompts) + 1)
        runs = (range(start, start + len(prompts)) for start in starts)
        group = Group(next(run for run in runs if taken.isdisjoint(run)), sampling, generator)
        for slot, prompt in zip(group.slots, prompts, strict=True):
            self.texts[slot], self.cached[slot] = list(prompt[-self.window :]), 0
            if sampling.repetition_penalty != 1:
                self._mark_seen(slot, prompt)
        self.sampling[group.slots.start : group.slots.stop] = self.sampling.new_tensor(
            [sampling.repetition_penalty, sampling.temperature,
             min(sampling.top_k or 0, self.engine.config.vocab_size), sampling.top_p or 1.0]
        )  # fmt: skip
        self.groups.append(group)
        self.going += group.slots
        return group

    def leave(self, group: Group) -> None:
        """Frees the group's slots."""
        self.groups.remove(group)
        self.going = [slot for slot in self.going if slot not in group.slots]

    def next_chunk(self, most: int) -> Tensor:
        """Draws 1 to `most` tokens (n, B) more, about CALL_SECONDS of them; -1 where there is none.

        At least one sequence must be going.
        """
        then = time.perf_counter()
        for slot in self.going:
            text = self.texts[slot]
            if len(text) > self.window:
                del text[: len(text) - self.window + self.stride]
                self.cached[slot] = 0
        rows = self._prefill()
        # Of whole windows the native loop can make the next ones.
        slide = self.stride == 0 and rows.shape[1] == self.window * len(self.going)
        if slide != self.slides:
            self.slides, self.pace = slide, 1
        room = [self.window + 1 - len(self.texts[slot]) for slot in self.going if not slide]
        steps = min(self.pace, most, *room)
        penalty, temperature, top_k, top_p = self.sampling.unbind(1)
        draw = partial(
            decode.generate,
            self.engine.packed, self.cache, rows, len(self.going), steps,
            repetition_penalty=penalty, temperature=temperature, top_k=top_k, top_p=top_p,
            seen=self.seen, noise=self._noise(steps), stop=self.stop_ids, slide=slide,
        )  # fmt: skip
        drawn, self.logits = draw() if self._is_short(rows) else interruptibly(draw)
        self.pace = max(1, min(8 * steps, int(CALL_SECONDS * steps / (time.perf_counter() - then))))
        return self._keep(drawn)

    def _is_short(self, rows: Tensor) -> bool:
        """Whether rows (3, R) are few enough for one call."""
        return rows.shape[1] * self.row_flops * self.engine.config.num_blocks <= CALL_FLOPS

    def _prefill(self) -> Tensor:
        """The rows (3, R) to go on from, once there are few enough of them for one call."""
        token, sequence, position = array("q"), array("q"), array("q")
        for b in self.going:
            text, first = self.texts[b], self.cached[b]
            token.extend(text[first:-1])
            sequence.extend([b] * (len(text) - 1 - first))
            position.extend(range(first, len(text) - 1))
        finals = len(self.going)
        token.extend(self.texts[b][-1] for b in self.going)
        sequence.extend(self.going)
        position.extend(len(self.texts[b]) - 1 for b in self.going)
        rows = torch.frombuffer(token + sequence + position, dtype=torch.int64).view(3, -1)
        if self._is_short(rows):
            return rows
        flops, blocks = self.row_flops, self.engine.config.num_blocks
        early, final = rows.split([rows.shape[1] - finals, finals], dim=1)
        parts = [part.contiguous() for part in early.split(max(16, int(CALL_FLOPS / flops)), dim=1)]
        width = decode.aligned(self.engine.config.model_dim)
        streams = [self._empty(part.shape[1], width) for part in parts]
        run = max(1, int(CALL_FLOPS / (max(1, parts[0].shape[1]) * flops)))
        for block in range(0, blocks, run):
            for x, part in zip(streams, parts, strict=True):  # a block's weights stay in cache
                end = min(block + run, blocks)
                decode.forward(x, self.engine.packed, self.cache, part, block, end)
        return final.contiguous()

    def give_back(self, used: int) -> None:
        """Takes back what the last chunk drew beyond its first `used` tokens.

        The generators stand then where those tokens alone would have left them. One that somebody
        else has drawn from, or seeded, since then is left alone.
        """
        for group in self.groups:
            generator = group.generator
            if group.states is None or not torch.equal(generator.get_state(), group.states[1]):
                continue
            generator.set_state(group.states[0])
            self._draw(used, group)
            group.states = group.states[0], generator.get_state()

    def _empty(self, *shape: int) -> Tensor:
        """Of float32 on the CPU, whatever torch's defaults are."""
        return self.engine.packed.new_empty(shape, dtype=torch.float32)

    def _mark_seen(self, slot: int, prompt: Sequence[int]) -> None:
        if self.seen is None:
            shape = (len(self.texts), self.engine.config.vocab_size)
            self.seen = self.engine.packed.new_zeros(shape, dtype=torch.uint8)
        self.seen[slot] = 0
        self.seen[slot, list(prompt)] = 1

    def _noise(self, steps: int) -> Tensor | None:
        """Exp(1) numbers (steps, B, V), drawn as torch.multinomial draws them step by step."""
        drawing = [group for group in self.groups if group.sampling.temperature > 0]
        if not drawing:
            return None
        noise = self._empty(steps, len(self.texts), self.engine.config.vocab_size)
        for group in drawing:
            before = group.generator.get_state()
            noise[:, group.slots.start : group.slots.stop] = self._draw(steps, group)
            group.states = before, group.generator.get_state()
        return noise

    def _draw(self, steps: int, group: Group) -> Tensor:
        """The group's part of the noise, (steps, b, V)."""
        shape = steps, len(group.slots), self.engine.config.vocab_size
        return decode.exponential(shape, group.generator)

    def _keep(self, drawn: Tensor) -> Tensor:
        """Takes the tokens (n, B) into the texts, up to the step at which the last one ended."""
        steps = drawn.tolist()
        for slot in self.going:
            self.texts[slot] += [step[slot] for step in steps if step[slot] >= 0]
            self.cached[slot] = len(self.texts[slot]) - 1
        if not self.stop:
            return drawn
        self.going = [slot for slot in self.going if self.texts[slot][-1] not in self.stop]
        used = sum(max(step) >= 0 for step in steps)
        if used < len(steps):
            self.give_back(used)
        return drawn[:used]


def chunks(slots: Slots, new: int) -> Iterator[Tensor]:
    """`new` tokens of all sequences, (n, B) at a time; fewer where all of them end.

    A sequence that has ended repeats its last token.
    """
    last = slots.engine.packed.new_empty(len(slots.texts), dtype=torch.int64)
    while new > 0 and slots.going:
        drawn = slots.next_chunk(new)
        new -= len(drawn)
        for slot, text in enumerate(slots.texts):
            last[slot] = text[-1]
        yield torch.where(drawn < 0, last, drawn) if slots.stop else drawn


def one_by_one(slots: Slots, new: int) -> Iterator[Tensor]:
    """The same, (B,) at a time. Closed early, it gives back the random numbers of later tokens."""
    for chunk in chunks(slots, new):
        for used, token in enumerate(chunk, 1):
            try:
                yield token
            except GeneratorExit:
                slots.give_back(used)
                raise
