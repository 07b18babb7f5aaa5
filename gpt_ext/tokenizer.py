"""The character vocabulary: token i is the i-th of the text's distinct characters, sorted."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class CharTokenizer:
    """Characters <-> token ids; `vocabulary` is a string whose character i is token i.

    Raises ValueError for an empty vocabulary or one with a character twice.
    """

    def __init__(self, vocabulary: str) -> None:
        if not vocabulary:
            raise ValueError("the vocabulary is empty")
        if len(set(vocabulary)) != len(vocabulary):
            raise ValueError("the vocabulary holds a character twice")
        self.vocabulary = vocabulary
        # table[code point] = id, -1 for the characters that have none
        self._table = torch.full((max(map(ord, vocabulary)) + 2,), -1)
        self._table[_code_points(vocabulary)] = torch.arange(len(vocabulary))

    @classmethod
    def from_text(cls, text: str) -> CharTokenizer:
        """The vocabulary sorted(set(text))."""
        return cls("".join(sorted(set(text))))

    def __len__(self) -> int:
        return len(self.vocabulary)

    def encode(self, text: str) -> Tensor:
        """Ids (len(text),) int64; ValueError names the first character outside the vocabulary."""
        codes = _code_points(text).clamp(max=len(self._table) - 1)  # the last entry is a -1
        ids = self._table[codes]
        unknown = (ids < 0).nonzero()
        if len(unknown):
            position = int(unknown[0])
            raise ValueError(
                f"character {text[position]!r} at position {position} is not among the "
                f"{len(self)} of the vocabulary"
            )
        return ids

    def decode(self, ids: Iterable[int] | Tensor) -> str:
        """The text of `ids`; IndexError for an id outside the vocabulary."""
        characters = []
        for token in map(int, ids):
            if not 0 <= token < len(self):
                raise IndexError(
                    f"token id {token} is outside the vocabulary, 0 to {len(self) - 1}"
                )
            characters.append(self.vocabulary[token])
        return "".join(characters)


def _code_points(text: str) -> Tensor:
    """The Unicode code points of `text`, int64."""
    if not text:
        return torch.empty(0, dtype=torch.int64)
    raw = bytearray(text, "utf-32-le", "surrogatepass")
    return torch.frombuffer(raw, dtype=torch.int32).long()
