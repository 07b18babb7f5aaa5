"""A model whose texts tell its weights from others."""

from __future__ import annotations

import torch

from gpt_ext import GPT

SIZES = dict(vocab_size=40, context_length=32, model_dim=48, num_blocks=2, num_heads=4)
START = torch.zeros(1, 1, dtype=torch.int64)


def new_model(**sizes: int) -> GPT:
    """A model of random weights, its logits spread so that no character is sure."""
    model = GPT(**SIZES | sizes).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    return model
