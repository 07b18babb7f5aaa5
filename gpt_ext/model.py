"""The model: a pre-norm, decoder-only transformer on the kernels of gpt_ext.ops.

Dims: B batch, T time, C model_dim, H heads, D = C / H head size, V vocabulary.
Sources: Vaswani et al., "Attention Is All You Need" (2017); pre-norm as in GPT-2, Radford et al.,
"Language Models are Unsupervised Multitask Learners" (2019).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from gpt_ext import generation, layouts
from gpt_ext.checks import check_tokens
from gpt_ext.ops import (
    Norm,
    cross_entropy,
    embedding,
    feed_forward,
    linear,
    packed_causal_attention,
)
from gpt_ext.ops.attention import MAX_HEAD_DIM
from gpt_ext.pretrained import Pretrained

Activation = Literal["relu", "gelu", "gelu_tanh"]


@dataclass(frozen=True)
class GPTConfig:
    """The arguments of `GPT`; raises ValueError for values that make no model."""

    vocab_size: int
    context_length: int
    model_dim: int
    num_blocks: int
    num_heads: int
    dropout: float = 0.2
    activation: Activation = "relu"
    qkv_bias: bool = False

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context_length", "model_dim", "num_blocks", "num_heads"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if self.model_dim % self.num_heads:
            raise ValueError(
                f"num_heads must divide model_dim, got {self.num_heads} heads of {self.model_dim}"
            )
        if self.model_dim // self.num_heads > MAX_HEAD_DIM:
            raise ValueError(
                f"model_dim / num_heads must be at most {MAX_HEAD_DIM}, "
                f"got {self.model_dim} / {self.num_heads}"
            )
        if not (isinstance(self.dropout, (int, float)) and 0 <= self.dropout <= 1):
            raise ValueError(f"dropout must be from 0 to 1, got {self.dropout!r}")
        if self.activation not in get_args(Activation):
            raise ValueError(
                f"activation must be one of {get_args(Activation)}, got {self.activation!r}"
            )


def norm_of(layer: nn.LayerNorm) -> Norm:
    """The layer as the ops take it, to be computed by the product that reads it."""
    return Norm(layer.weight, layer.bias, layer.eps)


class Attention(nn.Module):
    """x + dropout(causal multi-head self-attention of norm(x)), (B, T, C) -> (B, T, C)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        dim = config.model_dim
        self.packed_shape = (3, config.num_heads, dim // config.num_heads)
        self.qkv = nn.Linear(dim, 3 * dim, bias=config.qkv_bias)
        self.projection = nn.Linear(dim, dim)
        self.dropout = config.dropout

    def forward(
        self, x: Tensor, norm: Norm, attend: Callable[[Tensor], Tensor] = packed_causal_attention
    ) -> Tensor:
        qkv = linear(x, self.qkv.weight, self.qkv.bias, norm=norm)
        heads = attend(qkv.view(*x.shape[:2], *self.packed_shape))  # (B, T, H, D)
        return linear(
            heads.flatten(2), self.projection.weight, self.projection.bias,
            residual=x, dropout_p=self.dropout if self.training else 0.0,
        )  # fmt: skip


class FeedForward(nn.Module):
    """x + dropout(Linear, activation, Linear of norm(x)), four times as wide inside."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.activation = config.activation
        self.up = nn.Linear(config.model_dim, 4 * config.model_dim)
        self.down = nn.Linear(4 * config.model_dim, config.model_dim)
        self.dropout = config.dropout

    def forward(self, x: Tensor, norm: Norm) -> Tensor:
        up, down = self.up, self.down
        return feed_forward(
            x, up.weight, up.bias, down.weight, down.bias, activation=self.activation,
            norm=norm, dropout_p=self.dropout if self.training else 0.0,
        )  # fmt: skip


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)), (B, T, C) -> (B, T, C)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.model_dim)
        self.attention = Attention(config)
        self.feed_forward_norm = nn.LayerNorm(config.model_dim)
        self.feed_forward = FeedForward(config)

    def forward(
        self, x: Tensor, attend: Callable[[Tensor], Tensor] = packed_causal_attention
    ) -> Tensor:
        x = self.attention(x, norm_of(self.attention_norm), attend)
        return self.feed_forward(x, norm_of(self.feed_forward_norm))


class GPT(Pretrained, nn.Module):
    """A GPT: tokens (B, T) int64 -> raw logits (B, T, V).

    `activation` is "relu", "gelu" (exact) or "gelu_tanh"; `qkv_bias` gives the projection to
    queries, keys and values a bias; `dropout` acts on what attention and feed-forward add to the
    residual. Parameters start as PyTorch's layers start. Raises ValueError for sizes that make no
    model.

    Embeddings, norms and linear layers are read, not called: what they hold counts, while their
    hooks, or a `forward` of their own, never run. Blocks, and the attention and feed-forward in
    them, are called.
    """

    def __init__(
        self,
        vocab_size: int,
        context_length: int,
        model_dim: int,
        num_blocks: int,
        num_heads: int,
        *,
        dropout: float = 0.2,
        activation: Activation = "relu",
        qkv_bias: bool = False,
    ) -> None:
        super().__init__()
        self._config = config = GPTConfig(
            vocab_size, context_length, model_dim, num_blocks, num_heads,
            dropout=dropout, activation=activation, qkv_bias=qkv_bias,
        )  # fmt: skip
        self.token_embedding = nn.Embedding(vocab_size, model_dim)
        self.position_embedding = nn.Embedding(context_length, model_dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(num_blocks))
        self.final_norm = nn.LayerNorm(model_dim)
        self.vocab_projection = nn.Linear(model_dim, vocab_size)

    @property
    def config(self) -> GPTConfig:
        """The arguments this model was built with."""
        return self._config

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, T, V) of the token after each of `tokens` (B, T) int64, T <= context_length.

        Raises TypeError for another dtype, ValueError for another shape, and IndexError for an id
        outside the vocabulary; on CUDA, where looking would wait for the device, such an id fails
        a device-side assertion, which the next synchronisation raises.
        """
        return self.logits(self.hidden(tokens))

    def logits(self, x: Tensor) -> Tensor:
        """Logits (..., V) from what the blocks make of tokens, (..., C)."""
        head = self.vocab_projection
        return linear(x, head.weight, head.bias, norm=norm_of(self.final_norm))

    def hidden(self, tokens: Tensor) -> Tensor:
        """What the blocks make of `tokens` (B, T): (B, T, C), before the final norm."""
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return x

    def embed(self, tokens: Tensor, start: int = 0) -> Tensor:
        """Token plus position embedding, (B, T, C); the first token stands at position `start`."""
        check_tokens(tokens)
        end = start + tokens.shape[1]
        if end > self.config.context_length:
            raise ValueError(
                f"tokens reach position {end}, beyond context_length={self.config.context_length}"
            )
        positions = self.position_embedding.weight[start:end]
        return embedding(tokens, self.token_embedding.weight, positions)

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy, in nats a token, of `targets` (B, T) int64 after `tokens` (B, T).

        Targets of -100 are left out of the mean, as in torch.nn.functional.cross_entropy. Raises
        as `forward` does, for targets too.
        """
        hidden = self.hidden(tokens)
        if isinstance(targets, Tensor) and targets.shape != tokens.shape:
            raise ValueError(
                f"targets must be shaped like tokens, {tuple(tokens.shape)}, "
                f"got {tuple(targets.shape)}"
            )
        head = self.vocab_projection
        return cross_entropy(hidden, head.weight, head.bias, targets, norm=norm_of(self.final_norm))

    def generate(
        self,
        tokens: Tensor | Sequence[Tensor],
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float = 1.0,
        stop: Sequence[int] = (),
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        dtype: generation.WeightFormat = "float32",
        overflow: generation.Overflow = "exact",
        stride: int | None = None,
    ) -> Any:
        """`tokens` (B, T) int64, then the tokens that `stream` gives: (B, T + new).

        Of a list of prompts, (T,) each, it makes a list of texts, (T + new,) each, which end with
        their first stop token.
        """
        stop = generation.stop_ids(stop, self.config.vocab_size)
        drawn = generation.draw(
            self, tokens, max_new_tokens,
            temperature=temperature, top_k=top_k, top_p=top_p,
            repetition_penalty=repetition_penalty, stop=stop, generator=generator,
            dtype=dtype, overflow=overflow, stride=stride,
        )  # fmt: skip
        if isinstance(tokens, Tensor):
            return torch.cat((tokens, *(chunk.T for chunk in drawn)), dim=1)
        new = torch.cat([tokens[0].new_empty(0, len(tokens)), *drawn])
        return [
            torch.cat((prompt, generation.until_stop(column, stop)))
            for prompt, column in zip(tokens, new.unbind(1), strict=True)
        ]

    def stream(
        self,
        tokens: Tensor | Sequence[Tensor],
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float = 1.0,
        stop: Sequence[int] = (),
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        dtype: generation.WeightFormat = "float32",
        overflow: generation.Overflow = "exact",
        stride: int | None = None,
    ) -> Iterator[Tensor]:
        """Samples what follows `tokens`, (B, T) int64 or B prompts (T,): an iterator over (B,).

        It ends after `max_new_tokens`, or when every row has drawn one of the ids of `stop`; until
        then a row that has repeats it. Dropout is off, whatever the model's mode, which stays as
        it was. On a CPU the weights are those of the moment when the first token is asked for,
        unless the model was changed after it was built.

        Args:
            temperature: divides the logits; 0 takes the likeliest token.
            top_k: only so many of the likeliest tokens, and their equals, stay in the draw; above
                the vocabulary, all.
            top_p: and of those the smallest set whose probability reaches it (Holtzman et al.,
                2020).
            repetition_penalty: divides the positive logits of tokens that the row holds already,
                multiplies the negative ones (Keskar et al., 2019); 1 is none.
            generator: where the draws come from: PyTorch's default generator, this one, or one a
                row, each row then drawing what it would draw alone. Some tokens are drawn ahead;
                when the iterator is closed or dropped early, the generator goes back to where the
                tokens given out leave it, unless it was used or seeded by others meanwhile.
            dtype: of the weights that are multiplied, on a CPU: "float32", or a copy of them
                rounded to "bfloat16" or to "int8", one scale an output, which is read faster.
            overflow: each token sees the context_length tokens before it: "exact". "reprefill"
                computes the window anew only every `stride` tokens (a quarter of it unless given),
                and gives a token the last context_length - stride of them or more.

        Raises:
            TypeError, ValueError, IndexError: a bad argument, at the call.
            RuntimeError: logits are not finite, at the token that they are for.
        """
        return generation.draw(
            self, tokens, max_new_tokens, one_by_one=True,
            temperature=temperature, top_k=top_k, top_p=top_p,
            repetition_penalty=repetition_penalty, stop=stop, generator=generator,
            dtype=dtype, overflow=overflow, stride=stride,
        )  # fmt: skip

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Loads our own state dict, or one of the foreign layouts of `gpt_ext.layouts`.

        Raises RuntimeError where keys are missing or unexpected (naming the closest layout) or
        where the file wants a GPT built with other arguments (naming them).
        """
        own = layouts.to_own_layout(state_dict, self.config, strict)
        if assign:  # what is transposed in a file is copied then, too
            own = {name: weight.contiguous() for name, weight in own.items()}
        return super().load_state_dict(own, strict, assign)
