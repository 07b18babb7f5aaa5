"""CTranslate2: its decoder, written out as a model of its own format."""

from __future__ import annotations

import tempfile
from typing import Any

import ctranslate2
import torch
from ctranslate2.specs import TransformerDecoderModelSpec
from ctranslate2.specs.common_spec import Activation
from models import blocks_of
from torch import Tensor, nn

from gpt_ext import GPT

ACTIVATIONS = {
    "relu": Activation.RELU,
    "gelu": Activation.GELU,
    "gelu_tanh": Activation.GELUTanh,
}
END = "</s>"  # CTranslate2 wants one; its logit is never the largest


class CTranslate2:
    def __init__(self, model: GPT, dtype: str, batch: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            spec = specification(model)
            spec.validate()
            spec.optimize()
            spec.save(folder)
            self.generator = ctranslate2.Generator(
                folder, compute_type=dtype, intra_threads=torch.get_num_threads()
            )

    def generate(self, prompt: Tensor, new: int) -> Tensor:
        results = self.generator.generate_batch(
            [[str(token) for token in row] for row in prompt.tolist()],
            max_length=new,
            end_token=END,
            include_prompt_in_result=False,
        )
        return torch.tensor([result.sequences_ids[0] for result in results])


def specification(model: GPT) -> TransformerDecoderModelSpec:
    """The model as CTranslate2 describes it, with our weights and END as one more token."""
    config = model.config
    spec = TransformerDecoderModelSpec.from_config(
        config.num_blocks, config.num_heads, activation=ACTIVATIONS[config.activation]
    )
    decoder = spec.decoder
    decoder.scale_embeddings = False
    decoder.embeddings.weight = with_row(model.token_embedding.weight, 0)
    decoder.position_encodings.encodings = numbers(model.position_embedding.weight)
    fill_norm(decoder.layer_norm, model.final_norm)
    decoder.projection.weight = with_row(model.vocab_projection.weight, 0)
    decoder.projection.bias = with_row(model.vocab_projection.bias, -1e9)
    for layer, block in zip(decoder.layer, blocks_of(model), strict=True):
        fill_norm(layer.self_attention.layer_norm, block.attention_norm)
        fill_linear(layer.self_attention.linear[0], block.attention.qkv)
        fill_linear(layer.self_attention.linear[1], block.attention.projection)
        fill_norm(layer.ffn.layer_norm, block.feed_forward_norm)
        fill_linear(layer.ffn.linear_0, block.feed_forward.up)
        fill_linear(layer.ffn.linear_1, block.feed_forward.down)
    spec.register_vocabulary([*map(str, range(config.vocab_size)), END])
    spec.config.bos_token = spec.config.unk_token = "0"
    spec.config.eos_token = END
    return spec


def numbers(tensor: Tensor) -> Any:
    return tensor.detach().numpy()


def with_row(tensor: Tensor, value: float) -> Any:
    row = torch.full((1, *tensor.shape[1:]), value)
    return numbers(torch.cat((tensor.detach(), row)))


def fill_norm(spec: Any, norm: nn.LayerNorm) -> None:
    spec.gamma, spec.beta = numbers(norm.weight), numbers(norm.bias)


def fill_linear(spec: Any, linear: nn.Linear) -> None:
    spec.weight = numbers(linear.weight)
    if linear.bias is not None:
        spec.bias = numbers(linear.bias)
