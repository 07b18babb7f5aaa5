"""What the model asks of its tokens."""

from __future__ import annotations

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
