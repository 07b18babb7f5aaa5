"""The architectures whose weights GPT loads, in plain PyTorch, as their authors name the parts.

Nothing here uses gpt_ext. Each is built small and at random by the tests.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of one head or many, (..., T, D)."""
    scores = q @ k.mT / q.shape[-1] ** 0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(future, -torch.inf).softmax(-1) @ v


class Head(nn.Module):
    """One head of the course's models; `name` is how it calls its layers."""

    def __init__(self, dim: int, size: int, name: str) -> None:
        super().__init__()
        self.name = name
        for part in ("key", "query", "value"):
            self.add_module(name.format(part), nn.Linear(dim, size, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (getattr(self, self.name.format(p))(x) for p in ("query", "key", "value"))
        return attend(q, k, v)


class Course(nn.Module):
    """The course's "Code GPT": what the seed's weights.pt is a state dict of."""

    def __init__(
        self, vocab_size: int, context_length: int, model_dim: int, num_blocks: int, num_heads: int
    ) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, model_dim)
        self.pos_embedding = nn.Embedding(context_length, model_dim)
        self.transformer_blocks = nn.Sequential(
            *(self.Block(model_dim, num_heads) for _ in range(num_blocks))
        )
        self.layer_norm_three = nn.LayerNorm(model_dim)
        self.vocab_projection = nn.Linear(model_dim, vocab_size)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.token_embedding(tokens) + self.pos_embedding(positions)
        return self.vocab_projection(self.layer_norm_three(self.transformer_blocks(x)))

    class Block(nn.Module):
        def __init__(self, dim: int, heads: int) -> None:
            super().__init__()
            self.mhsa = Course.Attention(dim, heads)
            self.vanilla_nn = Course.FeedForward(dim)
            self.layer_norm_one = nn.LayerNorm(dim)
            self.layer_norm_two = nn.LayerNorm(dim)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.mhsa(self.layer_norm_one(x))
            return x + self.vanilla_nn(self.layer_norm_two(x))

    class Attention(nn.Module):
        def __init__(self, dim: int, heads: int) -> None:
            super().__init__()
            self.attention_heads = nn.ModuleList(
                Head(dim, dim // heads, "{}_layer") for _ in range(heads)
            )
            self.compute = nn.Linear(dim, dim)
            self.dropout = nn.Dropout(0.2)

        def forward(self, x: Tensor) -> Tensor:
            heads = torch.cat([head(x) for head in self.attention_heads], dim=-1)
            return self.dropout(self.compute(heads))

    class FeedForward(nn.Module):
        def __init__(self, dim: int) -> None:
            super().__init__()
            self.first_linear_layer = nn.Linear(dim, 4 * dim)
            self.second_linear_layer = nn.Linear(4 * dim, dim)
            self.dropout = nn.Dropout(0.2)

        def forward(self, x: Tensor) -> Tensor:
            return self.dropout(self.second_linear_layer(F.relu(self.first_linear_layer(x))))


class NewerCourse(nn.Module):
    """The course's later text: no output projection, or one without a bias."""

    def __init__(
        self,
        vocab_size: int,
        context_length: int,
        model_dim: int,
        num_blocks: int,
        num_heads: int,
        projected: bool = False,
    ) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(vocab_size, model_dim)
        self.position_embeddings = nn.Embedding(context_length, model_dim)
        self.transformer_blocks = nn.Sequential(
            *(self.Block(model_dim, num_heads, projected) for _ in range(num_blocks))
        )
        self.final_norm = nn.LayerNorm(model_dim)
        self.vocab_projection = nn.Linear(model_dim, vocab_size)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1])
        x = self.word_embeddings(tokens) + self.position_embeddings(positions)
        return self.vocab_projection(self.final_norm(self.transformer_blocks(x)))

    class Block(nn.Module):
        def __init__(self, dim: int, heads: int, projected: bool) -> None:
            super().__init__()
            self.attention = nn.Module()
            self.attention.att_heads = nn.ModuleList(
                Head(dim, dim // heads, "{}_gen") for _ in range(heads)
            )
            if projected:
                self.attention.output_proj = nn.Linear(dim, dim, bias=False)
            self.linear_network = nn.Module()
            self.linear_network.up_projection = nn.Linear(dim, 4 * dim)
            self.linear_network.down_projection = nn.Linear(4 * dim, dim)
            self.first_norm = nn.LayerNorm(dim)
            self.second_norm = nn.LayerNorm(dim)

        def forward(self, x: Tensor) -> Tensor:
            normed = self.first_norm(x)
            heads = torch.cat([head(normed) for head in self.attention.att_heads], dim=-1)
            projected = hasattr(self.attention, "output_proj")
            x = x + (self.attention.output_proj(heads) if projected else heads)
            network = self.linear_network
            return x + network.down_projection(F.relu(network.up_projection(self.second_norm(x))))


class Conv1D(nn.Module):
    """GPT-2's linear layer, its weight stored (in, out)."""

    def __init__(self, inner: int, outer: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inner, outer) / inner**0.5)
        self.bias = nn.Parameter(torch.randn(outer) / 10)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class NanoGPT(nn.Module):
    """nanoGPT's model, its head tied to the embedding; with Conv1D and tanh GELU it is GPT-2."""

    def __init__(
        self,
        vocab_size: int,
        context_length: int,
        model_dim: int,
        num_blocks: int,
        num_heads: int,
        bias: bool = True,
        linear: type = nn.Linear,
        gelu: Callable[[Tensor], Tensor] = F.gelu,
    ) -> None:
        super().__init__()
        self.heads, self.gelu = num_heads, gelu
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocab_size, model_dim),
                "wpe": nn.Embedding(context_length, model_dim),
                "h": nn.ModuleList(
                    self.block(model_dim, context_length, bias, linear) for _ in range(num_blocks)
                ),
                "ln_f": nn.LayerNorm(model_dim, bias=bias),
            }
        )
        self.lm_head = nn.Linear(model_dim, vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight

    @staticmethod
    def block(dim: int, context_length: int, bias: bool, linear: type) -> nn.ModuleDict:
        attn = nn.ModuleDict(
            {"c_attn": linear(dim, 3 * dim, bias=bias), "c_proj": linear(dim, dim, bias=bias)}
        )
        mask = torch.ones(context_length, context_length).tril()[None, None]
        attn.register_buffer("bias", mask)  # the causal mask, which older files hold
        mlp = nn.ModuleDict(
            {"c_fc": linear(dim, 4 * dim, bias=bias), "c_proj": linear(4 * dim, dim, bias=bias)}
        )
        norms = {name: nn.LayerNorm(dim, bias=bias) for name in ("ln_1", "ln_2")}
        return nn.ModuleDict(
            {"ln_1": norms["ln_1"], "attn": attn, "ln_2": norms["ln_2"], "mlp": mlp}
        )

    def forward(self, tokens: Tensor) -> Tensor:
        parts = self.transformer
        x = parts.wte(tokens) + parts.wpe(torch.arange(tokens.shape[1]))
        for block in parts.h:
            qkv = block.attn.c_attn(block.ln_1(x)).chunk(3, dim=-1)
            heads = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in qkv)
            x = x + block.attn.c_proj(attend(*heads).transpose(1, 2).flatten(2))
            x = x + block.mlp.c_proj(self.gelu(block.mlp.c_fc(block.ln_2(x))))
        return self.lm_head(parts.ln_f(x))
