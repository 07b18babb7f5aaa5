"""Byte-pair encoding (Sennrich et al., 2016) by the libraries `tokenizers` and `tiktoken`."""

from __future__ import annotations

import base64
import importlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gpt_ext.errors import UserError
from gpt_ext.tokenizer import TextOf, byte_stream, checked_ids

END = "<|endoftext|>"  # what GPT-2 calls the token after each document


class BPETokenizer:
    """A vocabulary of the library `tokenizers`, from the content of its tokenizer.json.

    What a text has that looks like a special token is encoded as the text it is. Raises ValueError
    for content that is no tokenizer, UserError where the library is missing.
    """

    def __init__(self, content: str) -> None:
        try:
            self._tokenizer = _library("tokenizers").Tokenizer.from_str(content)
        except UserError:
            raise
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(str(error)) from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self.end: int | None = self._tokenizer.token_to_id(END)

    @classmethod
    def train(cls, texts: Iterator[str], vocab_size: int) -> BPETokenizer:
        """A byte-level vocabulary of up to `vocab_size` tokens, GPT-2's way, learned from `texts`.

        ValueError below 257: the 256 bytes, and the end of a text.
        """
        if vocab_size < 257:
            raise ValueError(f"vocab_size must be at least 257 for BPE, got {vocab_size}")
        library = _library("tokenizers")
        tokenizer = library.Tokenizer(library.models.BPE())
        tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = library.decoders.ByteLevel()
        trainer = library.trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END],
            initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer.to_str())

    def __len__(self) -> int:
        ids = self._tokenizer.get_vocab(with_added_tokens=True).values()
        return max(ids, default=-1) + 1

    def encode(self, text: str) -> Tensor:
        """Ids (n,) int64, without the special tokens that a post-processor would add."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[Tensor]:
        """The ids of each of `texts`, on all cores; ValueError for a lone surrogate."""
        try:
            found = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        except TypeError:
            for text in texts:
                text.encode()  # a lone surrogate: UnicodeEncodeError, a ValueError
            raise
        return [torch.tensor(encoding.ids, dtype=torch.int64) for encoding in found]

    def decode(self, ids: Iterable[int] | Tensor) -> str:
        """The text of `ids`, special tokens included; IndexError for an id outside."""
        tokens = checked_ids(ids, len(self))
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=False)
        return text

    def stream(self) -> TextOf:
        decoder = _library("tokenizers").decoders.DecodeStream(skip_special_tokens=False)
        waiting: list[int] = []  # tokens since the last that completed a character

        def text_of(token: int | None) -> str:
            if token is None:
                return self.decode(waiting)
            text: str = decoder.step(self._tokenizer, token) or ""
            waiting.append(token)
            if text:
                waiting.clear()
            return text

        return text_of

    def unknown(self, characters: set[str]) -> set[str]:
        """Those that the vocabulary drops, or has only its token for unknown things for.

        White space, which many a vocabulary does not keep, is not among them.
        """
        candidates = sorted(c for c in characters if not c.isspace())
        stands_for_unknown = self._tokenizer.token_to_id(
            getattr(self._tokenizer.model, "unk_token", None) or ""
        )
        found = zip(candidates, self.encode_batch(candidates), strict=True)
        return {c for c, ids in found if not len(ids) or stands_for_unknown in ids.tolist()}

    def to_json(self) -> str:
        content: str = self._tokenizer.to_str()
        return content


class Tiktoken:
    """A vocabulary of the library `tiktoken`, kept whole, so that it is never fetched again."""

    def __init__(
        self, name: str, pattern: str, ranks: Mapping[bytes, int], special: Mapping[str, int]
    ) -> None:
        self._parts = name, pattern, dict(ranks), dict(special)
        self._encoding = _library("tiktoken").Encoding(
            name, pat_str=pattern, mergeable_ranks=dict(ranks), special_tokens=dict(special)
        )
        self.end = special.get(END)

    @classmethod
    def named(cls, name: str) -> Tiktoken:
        """What tiktoken calls `name`, such as gpt2, from its cache or where it publishes it.

        UserError for a name that it does not know, or cannot load.
        """
        try:
            found = _library("tiktoken").get_encoding(name)
        except UserError:
            raise
        except Exception as error:  # of the name, of the network, of the cache
            raise UserError(f"tiktoken can't load {name!r}: {error}") from None
        return cls(name, found._pat_str, found._mergeable_ranks, found._special_tokens)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Tiktoken:
        """The tokenizer of the content of a tokenizer.json; ValueError if that is damaged."""
        ranks = {base64.b64decode(token): rank for token, rank in content["ranks"].items()}
        return cls(content["name"], content["pattern"], ranks, content["special"])

    def __len__(self) -> int:
        size: int = self._encoding.n_vocab
        return size

    def encode(self, text: str) -> Tensor:
        """Ids (n,) int64; what looks like a special token is encoded as text."""
        return torch.tensor(self._encoding.encode_ordinary(text), dtype=torch.int64)

    def encode_batch(self, texts: Sequence[str]) -> list[Tensor]:
        """The ids of each of `texts`, on all cores."""
        found = self._encoding.encode_ordinary_batch(
            list(texts), num_threads=torch.get_num_threads()
        )
        return [torch.tensor(ids, dtype=torch.int64) for ids in found]

    def decode(self, ids: Iterable[int] | Tensor) -> str:
        """The text of `ids`, U+FFFD where they are no UTF-8; IndexError for an id outside."""
        tokens = checked_ids(ids, len(self))
        return b"".join(map(self._bytes, tokens)).decode("utf-8", "replace")

    def stream(self) -> TextOf:
        return byte_stream(self._bytes)

    def unknown(self, characters: set[str]) -> set[str]:
        return set()

    def to_json(self) -> str:
        name, pattern, ranks, special = self._parts
        tokens = {base64.b64encode(token).decode(): rank for token, rank in ranks.items()}
        return json.dumps(
            {
                "kind": "tiktoken",
                "name": name,
                "pattern": pattern,
                "special": special,
                "ranks": tokens,
            }
        )

    def _bytes(self, token: int) -> bytes:
        try:
            found: bytes = self._encoding.decode_single_token_bytes(token)
        except KeyError:  # a gap between the tokens and the special ones
            raise IndexError(f"token id {token} is not in {self._parts[0]}") from None
        return found


def _library(name: str) -> Any:
    """The module; UserError, with what to do, where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(
            f"this vocabulary takes the package {name}: pip install 'gpt-ext[bpe]'"
        ) from None
