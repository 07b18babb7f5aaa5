"""Generation on CPUs: a model's weights packed for the native engine, and its loop of calls.

Packs are kept a model and format, and shared: they never change. Whether a pack still holds the
model's weights is asked of the weights themselves, by a hash of all their bytes, whenever text is
asked for. So no way of changing a weight goes unnoticed, `.data` among them.
"""

from __future__ import annotations

import threading
import time
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from gpt_ext.ops import decode

if TYPE_CHECKING:
    from gpt_ext.model import GPT, GPTConfig

# Work of one native call, after which Python sees signals and other threads: 2.5e9 operations are
# some 20 ms on two cores with AVX2, and one token is never less.
CALL_FLOPS = 2.5e9
CALL_SECONDS = 0.02


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; the names are those of `GPT.stream`."""

    temperature: float
    top_k: int | None
    top_p: float | None
    repetition_penalty: float
    stop: Sequence[int]
    generators: Sequence[torch.Generator]  # one for all rows together, or one a row


@dataclass(frozen=True)
class Engine:
    """A model's weights as they were at one moment, packed."""

    config: GPTConfig
    form: decode.WeightFormat
    packed: Tensor


class NotPlainError(Exception):
    """The model is not as `GPT` builds it; the message says where."""


_engines: WeakKeyDictionary[GPT, dict[str, tuple[object, Engine]]] = WeakKeyDictionary()
_lock = threading.Lock()


def engine_for(model: GPT, form: decode.WeightFormat) -> Engine:
    """The engine with the model's weights of this moment; NotPlainError if there can be none."""
    weights, eps = weights_of(model)
    key = (eps, [(w.dtype, w.shape) for w in weights], decode.fingerprint(weights))
    with _lock:
        engines = _engines.setdefault(model, {})
        if form in engines and engines[form][0] == key:
            return engines[form][1]
    config = model.config
    packed = decode.pack(weights, config.num_heads, config.activation, form, eps)
    engine = Engine(config, form, packed)
    with _lock:
        engines[form] = (key, engine)
    return engine


def weights_of(model: GPT) -> tuple[list[Tensor], float]:
    """The model's weights in the order of `decode.pack`, and the eps of its norms.

    Raises NotPlainError where a module is not of the very type that GPT makes, or has hooks or a
    forward of its own: what such a module computes, the engine does not know.
    """
    from gpt_ext.model import GPT, Attention, Block, FeedForward

    eps: set[float] = set()

    def plain(name: str, module: Any, kind: type[nn.Module]) -> None:
        hooks = (module._forward_hooks, module._forward_pre_hooks)
        if type(module) is not kind or any(hooks) or "forward" in vars(module):
            raise NotPlainError(f"{name} is no plain {kind.__name__}")

    def leaf(name: str, module: Any, kind: type[nn.Module]) -> list[Tensor]:
        plain(name, module, kind)
        weight, bias = module.weight, getattr(module, "bias", None)
        if not isinstance(weight, Tensor) or weight.device.type != "cpu":
            raise NotPlainError(f"{name} has no weight on the CPU")
        if kind is nn.Embedding:
            return [weight]
        if kind is nn.LayerNorm:
            eps.add(module.eps)
        if bias is None and name.endswith("qkv"):
            bias = weight.new_zeros(weight.shape[0])
        if not isinstance(bias, Tensor):
            raise NotPlainError(f"{name} has no bias")
        return [weight, bias]

    plain("the model", model, GPT)
    weights = [
        *leaf("token_embedding", model.token_embedding, nn.Embedding),
        *leaf("position_embedding", model.position_embedding, nn.Embedding),
        *leaf("final_norm", model.final_norm, nn.LayerNorm),
        *leaf("vocab_projection", model.vocab_projection, nn.Linear),
    ]
    block: Any
    for i, block in enumerate(model.blocks):
        plain(f"blocks[{i}]", block, Block)
        plain(f"blocks[{i}].attention", block.attention, Attention)
        plain(f"blocks[{i}].feed_forward", block.feed_forward, FeedForward)
        for name, module, kind in (
            ("attention_norm", block.attention_norm, nn.LayerNorm),
            ("qkv", block.attention.qkv, nn.Linear),
            ("projection", block.attention.projection, nn.Linear),
            ("feed_forward_norm", block.feed_forward_norm, nn.LayerNorm),
            ("up", block.feed_forward.up, nn.Linear),
            ("down", block.feed_forward.down, nn.Linear),
        ):
            weights += leaf(f"blocks[{i}]'s {name}", module, kind)
    if len(eps) != 1:
        raise NotPlainError("its norms have different eps")
    return weights, eps.pop()


class Session:
    """Some sequences on their way: their texts, what of them is in the cache, their random numbers.

    A text is what the next token sees, at most `window` tokens. Where a token has no room left, the
    text is cut to its last `window - stride` tokens and computed anew, for all positions shift;
    stride 0 so gives each token the whole window before it.
    """

    def __init__(
        self, engine: Engine, prompts: Sequence[Sequence[int]], new: int, window: int,
        stride: int, sampling: Sampling,
    ) -> None:  # fmt: skip
        config = engine.config
        self.engine, self.window, self.stride, self.sampling = engine, window, stride, sampling
        self.texts = [list(prompt[-window:]) for prompt in prompts]
        self.cached = [0] * len(prompts)
        self.vocab_size = config.vocab_size
        # Of each generator, before and after the draws of the last call.
        self.states: list[tuple[Tensor, Tensor]] = []
        self.going = list(range(len(prompts)))
        self.last = torch.empty(len(prompts), dtype=torch.int64)  # of the sequences that ended
        longest = max(map(len, self.texts))
        self.cache = decode.Cache.empty(
            config.num_blocks, len(prompts), config.num_heads, min(window, longest + new),
            config.model_dim // config.num_heads, engine.form,
        )  # fmt: skip
        self.seen = None
        if sampling.repetition_penalty != 1:
            self.seen = torch.zeros(len(prompts), config.vocab_size, dtype=torch.uint8)
            for row, prompt in zip(self.seen, prompts, strict=True):
                row[list(prompt)] = 1
        self.stop = torch.tensor(sampling.stop, dtype=torch.int64) if sampling.stop else None

    def next_tokens(self, most: int) -> Tensor:
        """Draws 1 to `most` tokens (n, B) more; a sequence that has ended repeats its last."""
        texts, window = self.texts, self.window
        for b in self.going:
            if len(texts[b]) > window:
                del texts[b][: len(texts[b]) - window + self.stride]
                self.cached[b] = 0
        steps = min(most, *(window + 1 - len(texts[b]) for b in self.going))
        rows = self._prefill()
        sampling = self.sampling
        drawn, _ = decode.generate(
            self.engine.packed, self.cache, rows, len(self.going), steps,
            repetition_penalty=sampling.repetition_penalty, temperature=sampling.temperature,
            top_k=sampling.top_k or 0, top_p=sampling.top_p or 1.0,
            seen=self.seen, noise=self._noise(steps), stop=self.stop,
        )  # fmt: skip
        return self._keep(drawn)

    def _prefill(self) -> Tensor:
        """The rows (3, R) to go on from, once there are few enough of them for one call."""
        token, sequence, position = array("q"), array("q"), array("q")
        for b in self.going:
            text, first = self.texts[b], self.cached[b]
            token.extend(text[first:-1])
            sequence.extend([b] * (len(text) - 1 - first))
            position.extend(range(first, len(text) - 1))
        finals = len(self.going)
        token.extend(self.texts[b][-1] for b in self.going)
        sequence.extend(self.going)
        position.extend(len(self.texts[b]) - 1 for b in self.going)
        rows = torch.frombuffer(token + sequence + position, dtype=torch.int64).view(3, -1)
        flops = 24 * self.engine.config.model_dim**2  # of a row in a block
        blocks = self.engine.config.num_blocks
        if rows.shape[1] * flops * blocks <= CALL_FLOPS:
            return rows
        early, final = rows.split([rows.shape[1] - finals, finals], dim=1)
        for part in early.split(max(16, int(CALL_FLOPS / flops)), dim=1):
            piece = part.contiguous()
            x = torch.empty(piece.shape[1], decode.aligned(self.engine.config.model_dim))
            run = max(1, int(CALL_FLOPS / (max(1, piece.shape[1]) * flops)))
            for block in range(0, blocks, run):
                end = min(block + run, blocks)
                decode.forward(x, self.engine.packed, self.cache, piece, block, end)
        return final.contiguous()

    def give_back(self, used: int) -> None:
        """Takes back what the last call drew beyond its first `used` tokens.

        The generators stand then where those tokens alone would have left them. One that somebody
        else has drawn from, or seeded, since then is left alone.
        """
        for generator, (before, after) in zip(self.sampling.generators, self.states, strict=False):
            if torch.equal(generator.get_state(), after):
                generator.set_state(before)
                again = torch.empty(len(self.texts) // len(self.states), self.vocab_size)
                for _ in range(used):
                    again.exponential_(generator=generator)

    def _noise(self, steps: int) -> Tensor | None:
        """Exp(1) numbers (steps, B, V), drawn as torch.multinomial draws them step by step."""
        if self.sampling.temperature == 0:
            self.states = []
            return None
        generators = self.sampling.generators
        parts = len(generators)
        before = [generator.get_state() for generator in generators]
        noise = torch.empty(steps, parts, len(self.texts) // parts, self.vocab_size)
        for step in noise.unbind():
            for part, generator in zip(step.unbind(), generators, strict=True):
                part.exponential_(generator=generator)
        self.states = [(b, g.get_state()) for b, g in zip(before, generators, strict=True)]
        return noise.flatten(1, 2)

    def _keep(self, drawn: Tensor) -> Tensor:
        """Takes the tokens (n, B) into the texts, up to the step at which the last one ended."""
        steps = drawn.tolist()
        for b in self.going:
            self.texts[b] += [step[b] for step in steps if step[b] >= 0]
            self.cached[b] = len(self.texts[b]) - 1
        if self.stop is None:
            return drawn
        used = sum(max(step) >= 0 for step in steps)
        if used < len(steps):
            self.give_back(used)
        for b, text in enumerate(self.texts):
            self.last[b] = text[-1]
        self.going = [b for b in self.going if self.texts[b][-1] not in self.sampling.stop]
        return torch.where(drawn < 0, self.last, drawn)[:used]


def chunks(session: Session, new: int) -> Iterator[Tensor]:
    """`new` tokens of the session's sequences, (n, B) at a time; fewer where all sequences end.

    A chunk is of as many as are drawn in about CALL_SECONDS, the first of one.
    """
    steps = 1
    while new > 0 and session.going:
        start = time.perf_counter()
        drawn = session.next_tokens(min(steps, new))
        new -= len(drawn)
        token_seconds = (time.perf_counter() - start) / len(drawn)
        steps = max(1, min(8 * steps, int(CALL_SECONDS / token_seconds)))
        yield drawn


def one_by_one(session: Session, new: int) -> Iterator[Tensor]:
    """The same, (B,) at a time. Closed early, it gives back the random numbers of later tokens."""
    for chunk in chunks(session, new):
        for used, token in enumerate(chunk, 1):
            try:
                yield token
            except GeneratorExit:
                session.give_back(used)
                raise
