"""Ours, the seed's model as it is written, and plain PyTorch without and with a KV cache."""

from __future__ import annotations

import math
from typing import Any

import torch
from models import KVCache, blocks_of, torch_twin
from torch import Tensor, nn

from gpt_ext import GPT, GPTConfig


class Ours:
    def __init__(self, model: GPT, dtype: str, batch: int) -> None:
        self.model = model
        self.options: dict[str, Any] = {} if dtype == "float32" else {"dtype": dtype}

    def generate(self, prompt: Tensor, new: int) -> Tensor:
        tokens = self.model.generate(prompt, new, temperature=0, **self.options)
        return tokens[:, prompt.shape[1] :]


class SeedHead(nn.Module):
    """One head with projections of its own, from its formula: product, mask, softmax, product."""

    def __init__(self, dim: int, head_dim: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(dim, head_dim, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.query(x), self.key(x), self.value(x)
        scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
        past = torch.tril(torch.ones(x.shape[1], x.shape[1]))
        return scores.masked_fill(past == 0, -math.inf).softmax(dim=-1) @ v


class SeedBlock(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        dim, heads = config.model_dim, config.num_heads
        self.heads = nn.ModuleList(SeedHead(dim, dim // heads) for _ in range(heads))
        self.compute = nn.Linear(dim, dim)
        self.first, self.second = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.norm_one, self.norm_two = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm_one(x)
        x = x + self.compute(torch.cat([head(normed) for head in self.heads], dim=-1))
        return x + self.second(torch.relu(self.first(self.norm_two(x))))


class Seed:
    """A forward of the whole window for every token, logits of every position and all."""

    def __init__(self, model: GPT, dtype: str, batch: int) -> None:
        config = model.config
        if config.activation != "relu" or config.qkv_bias:
            raise ValueError("the seed's model has ReLU, and no bias on queries, keys and values")
        self.model, self.window = model.eval(), config.context_length
        self.blocks = [SeedBlock(config) for _ in range(config.num_blocks)]
        for theirs, ours in zip(self.blocks, blocks_of(model), strict=True):
            theirs.load_state_dict(seed_state(ours, config))

    @torch.no_grad()
    def generate(self, prompt: Tensor, new: int) -> Tensor:
        tokens = prompt
        for _ in range(new):
            window = tokens[:, -self.window :]
            x = self.model.token_embedding(window)
            x = x + self.model.position_embedding(torch.arange(window.shape[1]))
            for block in self.blocks:
                x = block(x)
            logits = self.model.vocab_projection(self.model.final_norm(x))
            probabilities = logits[:, -1].softmax(dim=-1)
            tokens = torch.cat([tokens, probabilities.argmax(dim=-1, keepdim=True)], dim=1)
        return tokens[:, prompt.shape[1] :]


def seed_state(block: nn.Module, config: GPTConfig) -> dict[str, Tensor]:
    """The state of a SeedBlock with our block's weights."""
    state = block.state_dict()
    names = {
        "attention.projection": "compute",
        "feed_forward.up": "first",
        "feed_forward.down": "second",
        "attention_norm": "norm_one",
        "feed_forward_norm": "norm_two",
    }
    theirs = {
        f"{name}.{kind}": state[f"{our_name}.{kind}"]
        for our_name, name in names.items()
        for kind in ("weight", "bias")
    }
    packed = state["attention.qkv.weight"].unflatten(0, (3, config.num_heads, -1))
    for part, of_part in zip(("query", "key", "value"), packed, strict=True):
        theirs |= {f"heads.{j}.{part}.weight": weight for j, weight in enumerate(of_part)}
    return theirs


class Uncached:
    """scaled_dot_product_attention over the whole window for every token, one position's logits."""

    def __init__(self, model: GPT, dtype: str, batch: int) -> None:
        self.model, self.window = torch_twin(model).eval(), model.config.context_length

    @torch.no_grad()
    def generate(self, prompt: Tensor, new: int) -> Tensor:
        tokens = prompt
        for _ in range(new):
            last = self.model.hidden(tokens[:, -self.window :])[:, -1]
            token = self.model.vocab_projection(last).argmax(dim=-1, keepdim=True)
            tokens = torch.cat([tokens, token], dim=1)
        return tokens[:, prompt.shape[1] :]


class Cached:
    """scaled_dot_product_attention over keys and values kept in place."""

    def __init__(self, model: GPT, dtype: str, batch: int) -> None:
        self.model, self.config = torch_twin(model).eval(), model.config

    @torch.no_grad()
    def generate(self, prompt: Tensor, new: int) -> Tensor:
        caches = [KVCache(self.config, len(prompt)) for _ in self.model.blocks]
        tokens = [prompt]
        for _ in range(new):
            last = self.model.hidden(tokens[-1], caches)[:, -1]
            tokens.append(self.model.vocab_projection(last).argmax(dim=-1, keepdim=True))
        return torch.cat(tokens[1:], dim=1)
