"""From a prompt to tokens: the sampling loop, its KV cache and the draw.

A key depends on its token's position, so cached keys and values hold only until the context is
full. From then on each step drops the oldest token and moves all others one position back, and the
window is computed anew: exact, where keeping the old keys would not be.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from gpt_ext.checks import check_token_ids, check_tokens
from gpt_ext.ops import packed_causal_attention

if TYPE_CHECKING:
    from gpt_ext.model import GPT


def generate(
    model: GPT,
    new_chars: int,
    context: Tensor,
    context_length: int,
    int_to_char: Mapping[int, str] | Sequence[str],
) -> str:
    """The `new_chars` characters that `model` writes after `context` (1, T) int64.

    Each is one torch.multinomial draw, from PyTorch's default generator, over the softmax of the
    last position, with a window of the last `context_length` tokens; `int_to_char` names a token.
    Dropout is off, whatever the model's mode. Raises as `GPT.stream` does.
    """
    if context.dim() == 2 and context.shape[0] != 1:
        raise ValueError(f"context must hold one sequence, (1, T), got {tuple(context.shape)}")
    new = stream(model, context, new_chars, context_length)
    return "".join(int_to_char[int(token)] for token in new)


def stream(
    model: GPT,
    tokens: Tensor,
    max_new_tokens: int,
    window: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """`GPT.stream` with a window of any length up to context_length."""
    check_tokens(tokens)
    check_token_ids(tokens, model.config.vocab_size)
    if not tokens.numel():
        raise ValueError(f"the prompt is empty: tokens are shaped {tuple(tokens.shape)}")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must not be negative, got {max_new_tokens}")
    if not 1 <= window <= model.config.context_length:
        raise ValueError(
            f"context_length must be from 1 to the model's {model.config.context_length}, "
            f"got {window}"
        )
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature must be finite and not negative, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")

    @torch.no_grad()
    def steps(tokens: Tensor) -> Iterator[Tensor]:
        caches = [KVCache() for _ in model.blocks]
        new = tokens = tokens[:, -window:]
        for _ in range(max_new_tokens):
            with dropout_off(model):
                if tokens.shape[1] > window:  # full: every position shifts, so nothing stays valid
                    tokens = new = tokens[:, -window:]
                    caches = [KVCache() for _ in model.blocks]
                logits = last_logits(model, new, caches)
            new = sample(logits, temperature, top_k, top_p, generator)
            tokens = torch.cat((tokens, new), dim=1)
            yield new[:, 0]

    return steps(tokens)


class KVCache:
    """The keys and values (B, T, H, D) of one block, for the tokens it has attended to so far."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    @property
    def length(self) -> int:
        return 0 if self.keys is None else self.keys.shape[1]

    def attend(self, qkv: Tensor) -> Tensor:
        """Attention of new tokens (B, T, 3, H, D) over the cached ones and themselves.

        The first call may bring many tokens; each later one brings one, which sees them all.
        """
        q, k, v = qkv.unbind(2)
        if self.keys is None or self.values is None:
            self.keys, self.values = k, v
            return packed_causal_attention(qkv)
        self.keys = torch.cat((self.keys, k), dim=1)
        self.values = torch.cat((self.values, v), dim=1)
        q, k, v = (t.transpose(1, 2) for t in (q, self.keys, self.values))  # (B, H, T, D)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def last_logits(model: GPT, new: Tensor, caches: Sequence[KVCache]) -> Tensor:
    """Logits (B, V) after `new` (B, T), the tokens that follow the cached ones."""
    x = model.embed(new, start=caches[0].length)
    for block, cache in zip(model.blocks, caches, strict=True):
        x = block(x, cache.attend)
    return model.vocab_projection(model.final_norm(x[:, -1]))


def sample(
    logits: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None,
) -> Tensor:
    """One draw (B, 1) a row of `logits` (B, V); the options are those of `GPT.stream`."""
    if not logits.isfinite().all():
        raise RuntimeError("the model's logits are not finite: its weights are damaged")
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        kth = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if top_p is not None:
        likeliest, order = logits.softmax(dim=-1).sort(dim=-1, descending=True)
        outside = likeliest.cumsum(dim=-1) - likeliest >= top_p  # reached before this token
        logits = logits.masked_fill(outside.gather(-1, order.argsort(dim=-1)), -math.inf)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)


@contextmanager
def dropout_off(model: GPT) -> Iterator[None]:
    """Evaluation mode inside; every module's own mode again after."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
