"""The models that are measured, and the same GPT as plain PyTorch writes it."""

from __future__ import annotations

from dataclasses import asdict
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt_ext import GPT, GPTConfig
from gpt_ext.model import Block

SEED = GPTConfig(104, 128, 252, 6, 6, dropout=0.2, activation="relu")
CHARS = GPTConfig(65, 64, 128, 4, 4, dropout=0.0, activation="gelu")
GPT2 = GPTConfig(50257, 1024, 768, 12, 12, dropout=0.0, activation="gelu_tanh", qkv_bias=True)


def build(config: GPTConfig) -> GPT:
    """Ours, with random weights."""
    return GPT(**asdict(config))


def blocks_of(model: GPT) -> list[Block]:
    return [cast(Block, block) for block in model.blocks]


def training_flops(config: GPTConfig, batch: int, time: int) -> float:
    """Floating-point operations of one training step, by what its formulas need.

    Two for each multiply-add of a matrix product, and three products (forward, and the gradients of
    both factors) for each of the model's: QKV, projection, the two of the feed-forward network, the
    vocabulary's, and attention's two, of which the causal half alone is counted. Recomputing the
    scores in backward, norms, activations, softmax and the optimizer are not counted.
    """
    dim, tokens = config.model_dim, batch * time
    weights = config.num_blocks * 12 * dim**2 + config.vocab_size * dim
    scores = config.num_blocks * batch * dim * time * (time + 1) / 2  # q k^T; P v is as much
    return 2 * 3 * (tokens * weights + 2 * scores)


class KVCache:
    """The keys and values (B, H, context_length, D) of one block; the first `length` are set."""

    def __init__(self, config: GPTConfig, batch: int) -> None:
        dim = config.model_dim // config.num_heads
        shape = (2, batch, config.num_heads, config.context_length, dim)
        self.keys, self.values = torch.empty(shape).unbind(0)
        self.length = 0

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keeps new keys and values (B, H, T, D); returns all there are."""
        start, self.length = self.length, self.length + k.shape[2]
        self.keys[:, :, start : self.length] = k
        self.values[:, :, start : self.length] = v
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]


class TorchAttention(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        dim, self.heads = config.model_dim, config.num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=config.qkv_bias)
        self.projection = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, cache: KVCache | None) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, H, T, D)
            for part in self.qkv(x).chunk(3, dim=-1)
        )
        if cache is not None:
            k, v = cache.extend(k, v)
        many = q.shape[2] > 1  # a single query sees everything
        out = F.scaled_dot_product_attention(q, k, v, is_causal=many)
        return self.dropout(self.projection(out.transpose(1, 2).flatten(2)))


class TorchFeedForward(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        dim, approximate = config.model_dim, "tanh" if config.activation == "gelu_tanh" else "none"
        self.up = nn.Linear(dim, 4 * dim)
        self.activation = nn.ReLU() if config.activation == "relu" else nn.GELU(approximate)
        self.down = nn.Linear(4 * dim, dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.down(self.activation(self.up(x))))


class TorchBlock(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.model_dim)
        self.attention = TorchAttention(config)
        self.feed_forward_norm = nn.LayerNorm(config.model_dim)
        self.feed_forward = TorchFeedForward(config)

    def forward(self, x: Tensor, cache: KVCache | None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cache)
        return x + self.feed_forward(self.feed_forward_norm(x))


class TorchGPT(nn.Module):
    """Our GPT in torch.nn and scaled_dot_product_attention alone; it takes our state dict."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.model_dim)
        self.position_embedding = nn.Embedding(config.context_length, config.model_dim)
        self.blocks = nn.ModuleList(TorchBlock(config) for _ in range(config.num_blocks))
        self.final_norm = nn.LayerNorm(config.model_dim)
        self.vocab_projection = nn.Linear(config.model_dim, config.vocab_size)

    def hidden(self, tokens: Tensor, caches: list[KVCache] | None = None) -> Tensor:
        """The normed end of the residual stream (B, T, C); with caches, tokens follow theirs."""
        start = caches[0].length if caches else 0
        positions = self.position_embedding.weight[start : start + tokens.shape[1]]
        x = self.token_embedding(tokens) + positions
        for i, block in enumerate(self.blocks):
            x = block(x, caches[i] if caches else None)
        return self.final_norm(x)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.vocab_projection(self.hidden(tokens))

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self(tokens).flatten(0, 1), targets.flatten())


def torch_twin(model: GPT) -> TorchGPT:
    """The plain PyTorch model with copies of `model`'s weights."""
    twin = TorchGPT(model.config).to(next(model.parameters()).device)
    twin.load_state_dict(model.state_dict())
    return twin
