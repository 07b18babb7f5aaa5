"""What the model asks of its tokens, and of numbers."""

from __future__ import annotations

import math
import operator
from numbers import Real
from typing import Any

import torch
from torch import Tensor


def check_tokens(tokens: Tensor) -> None:
    """Raises TypeError or ValueError unless `tokens` is an int64 tensor (B, T)."""
    if not isinstance(tokens, Tensor) or tokens.dtype != torch.int64:
        got = getattr(tokens, "dtype", type(tokens).__name__)
        raise TypeError(f"tokens must be an int64 tensor, got {got}")
    if tokens.dim() != 2:
        raise ValueError(f"tokens must be shaped (B, T), got {tuple(tokens.shape)}")


def check_token_ids(tokens: Tensor, vocab_size: int) -> None:
    """Raises IndexError, naming the first id that is not from 0 to vocab_size - 1."""
    bad = tokens[(tokens < 0) | (tokens >= vocab_size)]
    if bad.numel():
        raise IndexError(
            f"token id {bad[0].item()} is outside the vocabulary, 0 to {vocab_size - 1}"
        )


def integer(name: str, value: Any) -> int:
    """The value as an int; TypeError for what is none."""
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None


def number(name: str, value: Any) -> float:
    """The value as a float, infinite where it is too large for one; TypeError for no number."""
    if not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    try:
        return float(value)
    except OverflowError:
        return math.inf
