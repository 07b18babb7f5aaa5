"""Text <-> token ids: characters, bytes, and the BPE vocabularies of gpt_ext.bpe.

A tokenizer is kept in a file tokenizer.json beside what was made with it: BPE in the format of
the library `tokenizers`, the others as an object with a `kind`.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from gpt_ext.errors import UserError

FILE = "tokenizer.json"
TextOf = Callable[[int | None], str]


class Tokenizer(Protocol):
    """What every tokenizer does; `end` is the id of its token for the end of a text, if any."""

    end: int | None

    def __len__(self) -> int: ...

    def encode(self, text: str) -> Tensor:
        """Ids (n,) int64; ValueError where `text` has none."""

    def encode_batch(self, texts: Sequence[str]) -> list[Tensor]:
        """The ids of each of `texts`, as `encode` gives them."""

    def decode(self, ids: Iterable[int] | Tensor) -> str:
        """The text of `ids`; IndexError for an id outside the vocabulary."""

    def stream(self) -> TextOf:
        """A function that is given a text's tokens in turn: the characters that each completes.

        At the end it is given None: what was not completed, as `decode` has it.
        """

    def unknown(self, characters: set[str]) -> set[str]:
        """Those of `characters` that have no token."""

    def to_json(self) -> str:
        """What `from_json` makes the tokenizer of again."""


class CharTokenizer:
    """Characters <-> token ids; `vocabulary` is a string whose character i is token i.

    Raises ValueError for an empty vocabulary or one with a character twice.
    """

    end: int | None = None

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

    def encode_batch(self, texts: Sequence[str]) -> list[Tensor]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int] | Tensor) -> str:
        """The text of `ids`; IndexError for an id outside the vocabulary."""
        return "".join(self.vocabulary[token] for token in checked_ids(ids, len(self)))

    def stream(self) -> TextOf:
        return lambda token: "" if token is None else self.decode([token])

    def unknown(self, characters: set[str]) -> set[str]:
        return characters - set(self.vocabulary)

    def to_json(self) -> str:
        return json.dumps({"kind": "characters", "vocabulary": self.vocabulary})


class ByteTokenizer:
    """Bytes <-> token ids 0 to 255; text is UTF-8.

    A byte that is none, which Python reads as a lone surrogate ("surrogateescape"), is itself.
    """

    end: int | None = None

    def __len__(self) -> int:
        return 256

    def encode(self, text: str) -> Tensor:
        """Ids (n,) int64, one a byte of the UTF-8 text."""
        raw = bytearray(text, "utf-8", "surrogateescape")
        return torch.frombuffer(raw, dtype=torch.uint8).long() if raw else torch.empty(0).long()

    def encode_batch(self, texts: Sequence[str]) -> list[Tensor]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int] | Tensor) -> str:
        """The text of `ids`, U+FFFD where they are no UTF-8; IndexError for an id above 255."""
        return bytes(checked_ids(ids, 256)).decode("utf-8", "replace")

    def stream(self) -> TextOf:
        return byte_stream(lambda token: bytes(checked_ids([token], 256)))

    def unknown(self, characters: set[str]) -> set[str]:
        return set()

    def to_json(self) -> str:
        return json.dumps({"kind": "bytes"})


def from_json(text: str) -> Tokenizer:
    """The tokenizer of a tokenizer.json; ValueError where the text is none.

    UserError where it takes a library that is not installed.
    """
    content: Any = json.loads(text)
    kind = content.get("kind") if isinstance(content, dict) else None
    if kind == "characters":
        return CharTokenizer(content["vocabulary"])
    if kind == "bytes":
        return ByteTokenizer()
    if kind == "tiktoken" or (isinstance(content, dict) and "model" in content):
        from gpt_ext import bpe

        return bpe.Tiktoken.from_dict(content) if kind == "tiktoken" else bpe.BPETokenizer(text)
    raise ValueError("it describes no tokenizer that gpt_ext knows")


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a file, or of the tokenizer.json in a folder; UserError if it is none."""
    file = path / FILE if path.is_dir() else path
    try:
        return from_json(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file} can't be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} holds no tokenizer: {error}") from None


def piece_of(text_of: TextOf, token: int | None) -> str:
    """text_of(token); U+FFFD where it knows no such token, for a model may have more than it."""
    try:
        return text_of(token)
    except IndexError:
        return "\ufffd"


def byte_stream(bytes_of: Callable[[int], bytes]) -> TextOf:
    """`stream` of a tokenizer whose tokens are bytes: a character comes with its last byte."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def text_of(token: int | None) -> str:
        return decoder.decode(b"", final=True) if token is None else decoder.decode(bytes_of(token))

    return text_of


def checked_ids(ids: Iterable[int] | Tensor, size: int) -> list[int]:
    """`ids` as a list; IndexError for one that is not from 0 to size - 1."""
    tokens = [int(token) for token in ids]
    for token in tokens:
        if not 0 <= token < size:
            raise IndexError(f"token id {token} is outside the vocabulary, 0 to {size - 1}")
    return tokens


def _code_points(text: str) -> Tensor:
    """The Unicode code points of `text`, int64."""
    if text == "":
        return torch.empty(0, dtype=torch.int64)
    raw = bytearray(text, "utf-32-le", "surrogatepass")
    return torch.frombuffer(raw, dtype=torch.int32).long()
