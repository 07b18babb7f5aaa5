"""From a text file to batches of tokens."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from gpt_ext.errors import UserError


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


def split(tokens: Tensor, context_length: int) -> tuple[Tensor, Tensor]:
    """The first 90% of `tokens` (N,) for training and the rest for validation.

    UserError where either is too short for one sequence of `context_length` and its targets.
    """
    cut = len(tokens) * 9 // 10
    if len(tokens) - cut <= context_length:
        raise UserError(
            f"the data is too short: {len(tokens)} characters, but a context of {context_length} "
            f"needs at least {10 * context_length + 1}"
        )
    return tokens[:cut], tokens[cut:]


def random_batch(
    tokens: Tensor, batch_size: int, context_length: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Sequences x (B, T) from random places of `tokens` (N,), and y, the token after each."""
    starts = torch.randint(len(tokens) - context_length, (batch_size, 1), generator=generator)
    x = starts + torch.arange(context_length)
    return tokens[x], tokens[x + 1]
