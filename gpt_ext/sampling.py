"""Which tokens a step reads, and what its dropout draws: functions of the seed and the step alone.

Nothing of it has to be saved for a run to go on exactly, and processes that share a step's batch
know their parts without asking each other.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def derived_seed(*numbers: int) -> int:
    """A seed from several numbers, such as (seed, step, rank): other numbers, another seed.

    Of it PyTorch's generator of CPUs takes 32 bits: among 100,000 steps, two may draw the same.
    """
    digest = hashlib.sha256(repr(numbers).encode()).digest()
    return int.from_bytes(digest[:8], "little")


class Windows:
    """Sequences of `length` tokens and their targets, from 1-D `tokens` of any integer dtype.

    They come in an endless order of epochs. An epoch cuts the tokens into windows that do not
    overlap, beginning at a place of its own, and shuffles them. Needs `length` + 1 tokens or more.
    """

    def __init__(self, tokens: Tensor, length: int, seed: int) -> None:
        self.tokens, self.length, self.seed = tokens, length, seed
        # Windows an epoch, wherever below `length` it begins; a window's last target is beyond it.
        self.count = max(1, (len(tokens) - length) // length)
        self._epoch, self._starts = -1, torch.empty(0)

    def batch(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Windows number `first` to `first` + `count` - 1 of the order: x, y (count, T) int64."""
        starts, long = self.starts(first, count), self.length + 1
        rows = torch.stack([self.tokens[start : start + long] for start in starts]).long()
        return rows[:, :-1], rows[:, 1:]

    def starts(self, first: int, count: int) -> list[int]:
        """Where those windows begin."""
        found: list[int] = []
        while len(found) < count:
            epoch, place = divmod(first + len(found), self.count)
            self._enter(epoch)
            found += self._starts[place : place + count - len(found)].tolist()
        return found

    def _enter(self, epoch: int) -> None:
        if epoch == self._epoch:
            return
        generator = torch.Generator().manual_seed(derived_seed(self.seed, epoch))
        room = len(self.tokens) - self.count * self.length  # the last target included
        begin = torch.randint(min(self.length, room), (), generator=generator)
        order = torch.randperm(self.count, generator=generator)
        self._epoch, self._starts = epoch, begin + order * self.length
