"""From a prompt to tokens: what `GPT.stream` and `GPT.generate` do.

On CPUs the native engine does it (gpt_ext.engine); here are the checks, and the same loop in
PyTorch, for CUDA and for models that were changed after they were built.

A key depends on its token's position, so cached keys and values hold only until the context is
full. From then on each step drops the oldest token and moves all others one position back, and the
window is computed anew: exact, where keeping the old keys would not be.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpt_ext import engine, sequences
from gpt_ext.checks import check_token_ids, check_tokens, integer, number
from gpt_ext.ops import packed_causal_attention
from gpt_ext.ops.decode import FORMATS, WeightFormat
from gpt_ext.sequences import Sampling

if TYPE_CHECKING:
    from gpt_ext.model import GPT

Overflow = Literal["exact", "reprefill"]
Prompts = Tensor | Sequence[Tensor]
Generators = torch.Generator | Sequence[torch.Generator]


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
    check_tokens(context)
    if context.shape[0] != 1:
        raise ValueError(f"context must hold one sequence, (1, T), got {tuple(context.shape)}")
    chunks = draw(model, context, new_chars, window=context_length)
    return "".join(int_to_char[int(token)] for chunk in chunks for token in chunk)


def draw(
    model: GPT,
    prompts: Prompts,
    max_new_tokens: int,
    *,
    window: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop: Sequence[int] = (),
    generator: Generators | None = None,
    dtype: WeightFormat = "float32",
    overflow: Overflow = "exact",
    stride: int | None = None,
    one_by_one: bool = False,
) -> Iterator[Tensor]:
    """The tokens of `GPT.stream`, (n, B) at a time or, `one_by_one`, (B,).

    `window` is of any length up to context_length, which it is by default. All that is wrong with
    the arguments is raised here, before the first token is asked for.
    """
    config = model.config
    rows = check_prompts(prompts, config.vocab_size)
    max_new_tokens = integer("max_new_tokens", max_new_tokens)
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must not be negative, got {max_new_tokens}")
    window = config.context_length if window is None else integer("context_length", window)
    if not 1 <= window <= config.context_length:
        raise ValueError(
            f"context_length must be from 1 to the model's {config.context_length}, got {window}"
        )
    generators = check_generators(generator, len(rows), rows[0].device)
    sampling = Sampling(temperature, top_k, top_p, repetition_penalty)
    check_sampling(sampling)
    stop = stop_ids(stop, config.vocab_size)
    dropped = check_overflow(overflow, stride, window)
    ragged = len({len(row) for row in rows}) > 1
    check_dtype(model, dtype, ragged)

    def drawn() -> Iterator[Tensor]:
        try:
            native = engine.engine_for(model, dtype)
        except engine.NotPlainError:
            tokens = torch.stack(rows)
            for new in in_torch(
                model, tokens, max_new_tokens, window, dropped, sampling, stop, generators
            ):
                yield new if one_by_one else new[None]
            return
        longest = max(map(len, rows)) + max_new_tokens
        slots = sequences.Slots(native, len(rows), longest, window, dropped, stop)
        share = len(rows) // len(generators)
        for i, each in enumerate(generators):
            texts = [row.tolist() for row in rows[i * share : (i + 1) * share]]
            slots.join(texts, sampling, each)
        tokens_of = sequences.one_by_one if one_by_one else sequences.chunks
        yield from tokens_of(slots, max_new_tokens)

    return drawn()


def until_stop(tokens: Tensor, stop: Sequence[int]) -> Tensor:
    """`tokens` (n,) up to their first stop id, which is kept."""
    ends = torch.isin(tokens, tokens.new_tensor(stop)).nonzero()
    return tokens[: int(ends[0]) + 1] if len(ends) else tokens


def check_prompts(prompts: Any, vocab_size: int) -> list[Tensor]:
    """Copies of the prompts' rows, (T,) int64 each, once they are seen to be tokens."""
    if isinstance(prompts, Tensor):
        check_tokens(prompts)
        rows = list(prompts)
    elif not isinstance(prompts, Sequence):
        kind = type(prompts).__name__
        raise TypeError(f"tokens must be a tensor (B, T), or a sequence of (T,), got {kind}")
    else:
        rows = list(prompts)
        for i, row in enumerate(rows):
            if not isinstance(row, Tensor) or row.dim() != 1:
                got = tuple(row.shape) if isinstance(row, Tensor) else type(row).__name__
                raise ValueError(f"prompt {i} must be a tensor shaped (T,), got {got}")
            check_tokens(row[None])
    if not rows:
        raise ValueError("there is no prompt: tokens are shaped (0, T)")
    for i, row in enumerate(rows):
        check_token_ids(row, vocab_size)
        if not row.numel():
            if isinstance(prompts, Tensor):
                raise ValueError(f"the prompt is empty: tokens are shaped {(len(rows), 0)}")
            raise ValueError(f"prompt {i} is empty: its tokens are shaped (0,)")
    return [row.clone() for row in rows]  # read when the first token is asked for


def check_generators(
    generator: Generators | None, rows: int, device: torch.device
) -> Sequence[torch.Generator]:
    """One generator for all rows, the device's default one unless given, or one a row."""
    if generator is None:
        return (default_generator(device),)
    generators = tuple(generator) if isinstance(generator, Iterable) else (generator,)
    if not all(isinstance(each, torch.Generator) for each in generators):
        raise TypeError(f"generator must be a torch.Generator, or one a row, got {generator!r}")
    if isinstance(generator, Iterable) and len(generators) != rows:
        raise ValueError(f"generator must be one, or one a row: {rows}, got {len(generators)}")
    if len(set(map(id, generators))) < len(generators):
        raise ValueError("generator must be one, or one a row: one is given for several rows")
    return generators


def default_generator(device: torch.device) -> torch.Generator:
    """The one that torch.manual_seed seeds for this device: draws take no other device's."""
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index]
    return torch.default_generator


def check_sampling(sampling: Sampling) -> None:
    """Raises TypeError or ValueError for what is no way of drawing."""
    temperature = number("temperature", sampling.temperature)
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature must be finite and not negative, got {temperature}")
    top_k, top_p = sampling.top_k, sampling.top_p
    if top_k is not None and integer("top_k", top_k) < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if top_p is not None and not 0 < number("top_p", top_p) <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
    penalty = number("repetition_penalty", sampling.repetition_penalty)
    if not (math.isfinite(penalty) and penalty > 0):
        raise ValueError(f"repetition_penalty must be finite and above 0, got {penalty}")


def stop_ids(stop: Iterable[int], vocab_size: int) -> list[int]:
    """The ids, once they are seen to be tokens: else TypeError or IndexError."""
    if not isinstance(stop, Iterable) or getattr(stop, "ndim", 1) == 0:
        raise TypeError(f"stop must be a sequence of token ids, got {stop!r}")
    ids = [integer("a stop id", token) for token in stop]
    for token in ids:
        if not 0 <= token < vocab_size:
            raise IndexError(f"stop id {token} is outside the vocabulary, 0 to {vocab_size - 1}")
    return ids


def check_overflow(overflow: str, stride: int | None, window: int) -> int:
    """By how many tokens more than it must the window moves when it is full."""
    if overflow not in get_args(Overflow):
        raise ValueError(f"overflow must be exact or reprefill, got {overflow!r}")
    if overflow == "exact":
        if stride is not None:
            raise ValueError(f"stride is for overflow='reprefill', got {stride} with 'exact'")
        return 0
    if stride is None:
        return window // 4
    stride = integer("stride", stride)
    if not 1 <= stride < window:
        raise ValueError(f"stride must be from 1 to {window - 1}, below the window, got {stride}")
    return stride


def check_dtype(model: GPT, dtype: str, ragged: bool) -> None:
    """Raises ValueError for a dtype that is none, and for what PyTorch's loop does not do."""
    if dtype not in FORMATS:
        raise ValueError(f"dtype must be one of {', '.join(FORMATS)}, got {dtype!r}")
    if dtype == "float32" and not ragged:
        return
    try:
        engine.weights_of(model)
    except engine.NotPlainError as error:
        what = "prompts of different lengths" if ragged else f"dtype {dtype!r}"
        raise ValueError(f"{what}: for a model on the CPU as GPT builds it, but {error}") from None


@torch.no_grad()
def in_torch(
    model: GPT, tokens: Tensor, max_new_tokens: int, window: int, dropped: int,
    sampling: Sampling, stop: Sequence[int], generators: Sequence[torch.Generator],
) -> Iterator[Tensor]:  # fmt: skip
    """The engine's loop in PyTorch: tokens (B,) after `tokens` (B, T), one by one."""
    caches = [KVCache() for _ in model.blocks]
    seen = F.one_hot(tokens, model.config.vocab_size).amax(dim=1).bool()  # (B, V)
    stop_ids = torch.tensor(stop, dtype=torch.int64, device=tokens.device)
    ended = tokens.new_zeros(tokens.shape[0], 1, dtype=torch.bool)
    new = tokens = tokens[:, -window:]
    for _ in range(max_new_tokens):
        with dropout_off(model):
            if tokens.shape[1] > window:  # full: every position shifts, so nothing stays valid
                tokens = new = tokens[:, dropped - window :]
                caches = [KVCache() for _ in model.blocks]
            logits = last_logits(model, new, caches)
        new = torch.where(ended, tokens[:, -1:], sample(logits, seen, sampling, generators))
        seen.scatter_(1, new, True)
        tokens = torch.cat((tokens, new), dim=1)
        yield new[:, 0].clone()  # the caller's own
        ended = ended | torch.isin(new, stop_ids)
        if stop and ended.all():
            return


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
    return model.logits(x[:, -1])


def sample(
    logits: Tensor, seen: Tensor, sampling: Sampling, generators: Sequence[torch.Generator]
) -> Tensor:
    """One draw (B, 1) a row of `logits` (B, V), of which `seen` (B, V) were seen before."""
    if not logits.isfinite().all():
        raise RuntimeError("the model's logits are not finite: its weights are damaged")
    limits = torch.finfo(torch.float32)
    penalty = sampling.repetition_penalty
    if penalty != 1:
        penalised = torch.where(logits > 0, logits / penalty, logits * min(penalty, limits.max))
        logits = torch.where(seen, penalised, logits).clamp(-limits.max, limits.max)
    if sampling.temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits.float()
    logits = (logits - logits.amax(-1, keepdim=True)) / max(sampling.temperature, limits.tiny)
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        kth = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if sampling.top_p is not None:
        likeliest, order = logits.softmax(dim=-1).sort(dim=-1, descending=True)
        outside = likeliest.cumsum(dim=-1) - likeliest >= sampling.top_p  # reached before it
        outside[:, 0] = False
        logits = logits.masked_fill(outside.gather(-1, order.argsort(dim=-1)), -math.inf)
    draws = [
        torch.multinomial(part, 1, generator=generator)
        for part, generator in zip(
            logits.softmax(-1).chunk(len(generators)), generators, strict=True
        )
    ]
    return torch.cat(draws)


# Models kept in evaluation mode: by how many, and the modules that were in the other one.
_evaluated: WeakKeyDictionary[GPT, tuple[int, list[nn.Module]]] = WeakKeyDictionary()
_evaluated_lock = threading.Lock()


@contextmanager
def dropout_off(model: GPT) -> Iterator[None]:
    """Evaluation mode inside; every module's own mode again when the last thread has left."""
    with _evaluated_lock:
        users, training = _evaluated.get(model, (0, []))
        if not users:
            training = [module for module in model.modules() if module.training]
            model.eval()
        _evaluated[model] = users + 1, training
    try:
        yield
    finally:
        with _evaluated_lock:
            users, training = _evaluated.pop(model)
            if users > 1:
                _evaluated[model] = users - 1, training
            else:
                for module in training:
                    module.training = True
