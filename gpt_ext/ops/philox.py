"""Philox4x32-10 in plain PyTorch: the very numbers that the kernels' dropout draws.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. Words of 32 bits are held in
int64 tensors; the kernels' own code is csrc/common/philox.h.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_LOW_32 = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)  # the golden ratio and sqrt(3) - 1

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of a * b, by halves of 16 bits so that no product leaves int64."""
    low = a * (b & 0xFFFF)
    middle = a * (b >> 16) + (low >> 16)
    return middle >> 16, (middle & 0xFFFF) << 16 | (low & 0xFFFF)


def philox(key: tuple[Tensor, Tensor], counter: Words) -> Words:
    """Four random words of 32 bits for each key and counter, which broadcast against each other."""
    k0, k1 = key
    c0, c1, c2, c3 = counter
    for _ in range(10):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _LOW_32, (k1 + _WEYL[1]) & _LOW_32
    return c0, c1, c2, c3


def _keep_mask(
    seed: Tensor, dropout_p: float, planes: int, rows: int, columns: int, op: int
) -> Tensor:
    """(planes, rows, columns): whether the word drawn for an element is at least p * 2^32.

    It is word column % 4 of the block with counter (column / 4, row, plane, op).
    """
    key = seed & _LOW_32, (seed >> 32) & _LOW_32
    blocks = (columns + 3) // 4
    place = torch.arange(max(planes, rows, blocks), device=seed.device)
    counter = (
        place[:blocks],
        place[:rows, None],
        place[:planes, None, None],
        torch.full_like(seed, op),
    )
    words = philox(key, counter)
    drawn = torch.stack([word.expand(planes, rows, blocks) for word in words], dim=-1)
    return (drawn >= int(dropout_p * 2**32)).flatten(-2)[..., :columns]


def attention_keep_mask(
    seed: Tensor, dropout_p: float, batch: int, heads: int, time: int
) -> Tensor:
    """Which of attention's probabilities, (B, H, T, T), dropout keeps; seed (1), int64.

    Element (b, h, i, j) takes word j % 4 of the block with counter (j / 4, i, b * H + h, 0).
    """
    keep = _keep_mask(seed, dropout_p, batch * heads, time, time, 0)
    return keep.unflatten(0, (batch, heads))


def residual_keep_mask(seed: Tensor, dropout_p: float, rows: int, columns: int) -> Tensor:
    """Which elements (rows, columns) of a sub-layer's result dropout keeps; seed (1), int64.

    Element (row, column) takes word column % 4 of the block with counter (column / 4, row, 0, 1).
    """
    return _keep_mask(seed, dropout_p, 1, rows, columns, 1)[0]


def residual_dropout(x: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor:
    """Dropout of x (..., d) by residual_keep_mask; without a seed, none."""
    if seed is None:
        return x
    keep = residual_keep_mask(seed, dropout_p, math.prod(x.shape[:-1]), x.shape[-1])
    kept_scale = 1 / (1 - dropout_p) if dropout_p < 1 else 0.0
    return x * (keep.view(x.shape).to(x.dtype) * kept_scale)
