"""The raw ops of the decode engine, csrc/ops/decode.h: CPU, no gradients, nothing to trace.

Dims: B sequences, T' positions and D' head size, both rounded up to `ALIGN`, V vocabulary, L
blocks, H heads, C width, R rows. A row is one token of one sequence at one position.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from gpt_ext.ops.ffn import ACTIVATIONS

WeightFormat = Literal["float32", "bfloat16", "int8"]
FORMATS = get_args(WeightFormat)  # in the order of gpt_ext::WeightFormat
ALIGN = 16  # kDecodeAlign


def aligned(n: int) -> int:
    """`n`, rounded up to `ALIGN`."""
    return -(-n // ALIGN) * ALIGN


def fingerprint(tensors: Sequence[Tensor]) -> int:
    """A 64-bit hash of the tensors' bytes; a change of one word always changes it."""
    return torch.ops.gpt_ext.decode_fingerprint([t.detach().contiguous() for t in tensors])


def pack(
    weights: Sequence[Tensor], heads: int, activation: str, form: WeightFormat, norm_eps: float
) -> Tensor:
    """The weights, in the order that csrc/torch/library.cpp gives, as one tensor of bytes."""
    return torch.ops.gpt_ext.decode_pack(
        [t.detach().float().contiguous() for t in weights],
        heads, ACTIVATIONS.index(activation), FORMATS.index(form), norm_eps,
    )  # fmt: skip


class Cache(NamedTuple):
    """Keys and values, (L, B, H, T', D') each; how they lie inside is the engine's own."""

    keys: Tensor
    values: Tensor

    @classmethod
    def empty(
        cls, blocks: int, sequences: int, heads: int, positions: int, head_size: int,
        form: WeightFormat,
    ) -> Cache:  # fmt: skip
        """For so many sequences and positions: float32 beside float32 weights, else bfloat16."""
        shape = (blocks, sequences, heads, aligned(positions), aligned(head_size))
        if form == "float32":
            keys = torch.empty(shape, dtype=torch.float32, device="cpu")
            return cls(keys, torch.empty_like(keys))
        keys = torch.empty(shape, dtype=torch.bfloat16, device="cpu")
        return cls(keys, torch.zeros_like(keys))  # zeros, as a step of k takes two values


def forward(
    x: Tensor, packed: Tensor, cache: Cache, rows: Tensor, first_block: int, end_block: int
) -> None:
    """Takes `rows` (3, R) int64, tokens, sequences and positions, through a run of blocks.

    Fills the cache. `x` (R, C') float32 is the residual stream, set where `first_block` is 0; of
    the model's last block only keys and values are made, and x stays what went into it.
    """
    torch.ops.gpt_ext.decode_forward(
        x, packed, cache.keys, cache.values, rows, first_block, end_block
    )


def exponential(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Exp(1) numbers, float32 on the CPU: bit for bit what Tensor.exponential_ makes of them.

    Which takes the logarithms one by one, and with them the time of a small model's token: a
    millisecond for GPT-2's vocabulary, and less than half of that so.
    """
    uniform = torch.empty(shape, dtype=torch.float64, device="cpu").uniform_(generator=generator)
    return uniform.neg_().log1p_().float().neg_()


def generate(
    packed: Tensor,
    cache: Cache,
    rows: Tensor,
    finals: int,
    steps: int,
    *,
    repetition_penalty: float | Tensor = 1.0,
    temperature: float | Tensor = 0.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    seen: Tensor | None = None,
    noise: Tensor | None = None,
    stop: Tensor | None = None,
    slide: bool = False,
) -> tuple[Tensor, Tensor]:
    """Takes `rows` through all blocks and draws `steps` tokens after each of the last `finals`.

    How tokens are drawn is told by a number for all sequences, or by a tensor (B), one a sequence.
    noise (steps, B, V) is drawn from Exp(1), seen (B, V) uint8 marks the tokens that the penalty
    is for, stop (S) int64 ends a sequence. Returns tokens (steps, B), -1 where a sequence has ended
    or has no row, and the logits before the last token drawn, (finals, V') of which V count. Where
    texts `slide`, rows are whole texts, which each step takes anew, without the first token and
    with the one drawn.
    """
    sampling = torch.empty(cache.keys.shape[1], 4, dtype=torch.float64, device="cpu")
    for column, value in enumerate((repetition_penalty, temperature, top_k, top_p)):
        sampling[:, column] = value
    return torch.ops.gpt_ext.decode_generate(
        packed, cache.keys, cache.values, rows, finals, steps, sampling, seen, noise, stop, slide
    )  # fmt: skip
