"""From a text file, or from what `gpt-ext prepare` made of many, to batches of tokens."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gpt_ext.errors import UserError
from gpt_ext.tokenizer import CharTokenizer, Tokenizer, load_tokenizer

MANIFEST, TOKENS = "manifest.json", "tokens.bin"
DTYPES = {"uint16": torch.uint16, "uint32": torch.uint32}


@dataclass(frozen=True)
class DataSet:
    """Tokens to learn from; `sha256` names their content, and `path` where they are.

    `training` and `validation` are 1-D: int64, or uint16 or uint32 and mapped from a file, of which
    only what is looked at is read.
    """

    path: Path
    tokenizer: Tokenizer
    training: Tensor
    validation: Tensor
    sha256: str

    def check_lengths(self, context_length: int) -> None:
        """UserError where a part is too short for one sequence of this length and its targets."""
        for name, tokens in (("training", self.training), ("validation", self.validation)):
            if len(tokens) <= context_length:
                raise UserError(
                    f"the data is too short: {len(tokens)} tokens for {name}, but a context of "
                    f"{context_length} needs at least {context_length + 1}"
                )


def open_dataset(path: Path) -> DataSet:
    """The data set in a folder that `gpt-ext prepare` made, or of the characters of a text file.

    Of a text file the first 90% are for training. UserError for what is neither, or damaged.
    """
    if not path.is_dir():
        text = read_text(path)
        tokenizer = CharTokenizer.from_text(text)
        tokens = tokenizer.encode(text)
        cut = len(tokens) * 9 // 10
        sha256 = hashlib.sha256(text.encode()).hexdigest()
        return DataSet(path, tokenizer, tokens[:cut], tokens[cut:], sha256)
    manifest = path / MANIFEST
    if not manifest.is_file():
        raise UserError(f"{path} is a folder without a data set; to make one: gpt-ext prepare")
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
        count, cut = content["tokens"], content["training_tokens"]
        dtype, sha256 = DTYPES[content["dtype"]], content["sha256"][TOKENS]
        size = (path / TOKENS).stat().st_size
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{manifest} is damaged: {error}") from None
    if size != count * dtype.itemsize:
        raise UserError(
            f"{path / TOKENS} is damaged: {size} bytes, expected {count * dtype.itemsize}"
        )
    tokens = torch.from_file(str(path / TOKENS), size=count, dtype=dtype)
    return DataSet(path, load_tokenizer(path), tokens[:cut], tokens[cut:], sha256)


def read_text(path: Path) -> str:
    """The UTF-8 text of a file, line ends as they are; UserError where there is none."""
    if path.is_dir():
        raise UserError(f"{path} is a folder, expected a text file")
    if not path.exists():
        raise UserError(f"{path} does not exist")
    raw = path.read_bytes()
    if not raw:
        raise UserError(f"{path} is empty")
    if (offset := raw.find(b"\0")) >= 0:
        raise UserError(f"{path} is binary, not text: zero byte at offset {offset}")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text: byte 0x{raw[error.start]:02x} at offset {error.start}"
        ) from None
