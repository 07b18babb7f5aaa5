"""Hugging Face transformers' GPT-2, through its generate()."""

from __future__ import annotations

from typing import Any

import torch
from models import blocks_of
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from gpt_ext import GPT

ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "gelu_tanh": "gelu_new"}


class Transformers:
    def __init__(self, model: GPT, dtype: str, batch: int) -> None:
        config = model.config
        self.model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=config.vocab_size,
                n_positions=config.context_length,
                n_embd=config.model_dim,
                n_layer=config.num_blocks,
                n_head=config.num_heads,
                activation_function=ACTIVATIONS[config.activation],
                tie_word_embeddings=False,
                bos_token_id=None,
                eos_token_id=None,
            )
        ).eval()
        self.model.load_state_dict(gpt2_state(model))

    @torch.no_grad()
    def generate(self, prompt: Tensor, new: int) -> Tensor:
        tokens = self.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
        )
        return tokens[:, prompt.shape[1] :]


def gpt2_state(model: GPT) -> dict[str, Tensor]:
    """Our weights under GPT-2's names, those inside blocks transposed, less the vocabulary bias."""
    state: dict[str, Tensor] = {
        "transformer.wte.weight": model.token_embedding.weight,
        "transformer.wpe.weight": model.position_embedding.weight,
        "transformer.ln_f.weight": model.final_norm.weight,
        "transformer.ln_f.bias": model.final_norm.bias,
        "lm_head.weight": model.vocab_projection.weight,
    }
    for i, block in enumerate(blocks_of(model)):
        layers: dict[str, Any] = {
            "ln_1": block.attention_norm,
            "attn.c_attn": block.attention.qkv,
            "attn.c_proj": block.attention.projection,
            "ln_2": block.feed_forward_norm,
            "mlp.c_fc": block.feed_forward.up,
            "mlp.c_proj": block.feed_forward.down,
        }
        for name, layer in layers.items():
            weight = layer.weight
            bias = torch.zeros(len(weight)) if layer.bias is None else layer.bias
            state[f"transformer.h.{i}.{name}.weight"] = weight.T if weight.dim() == 2 else weight
            state[f"transformer.h.{i}.{name}.bias"] = bias
    return {name: tensor.detach() for name, tensor in state.items()}
