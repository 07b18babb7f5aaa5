"""The inference graph for other programs: torch.export's format, and ONNX.

It is composed of PyTorch's own ops, so that what runs it needs nothing of gpt_ext.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt_ext import engine
from gpt_ext.checkpoint import write_whole
from gpt_ext.errors import UserError
from gpt_ext.generation import dropout_off
from gpt_ext.model import GPT

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}
ONNX_LIMIT = 1 << 31  # bytes, of protobuf


class PlainGPT(nn.Module):
    """What a GPT computes in evaluation mode, tokens (B, T) -> logits (B, T, V), on its weights."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.gpt = model
        self.activation = ACTIVATIONS[model.config.activation]

    def forward(self, tokens: Tensor) -> Tensor:
        gpt, heads = self.gpt, self.gpt.config.num_heads
        x = gpt.token_embedding(tokens) + gpt.position_embedding.weight[: tokens.shape[1]]
        block: Any
        for block in gpt.blocks:
            qkv = block.attention.qkv(block.attention_norm(x)).unflatten(-1, (3, heads, -1))
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()  # (B, H, T, D)
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + block.attention.projection(attended.transpose(1, 2).flatten(2))
            hidden = self.activation(block.feed_forward.up(block.feed_forward_norm(x)))
            x = x + block.feed_forward.down(hidden)
        return gpt.vocab_projection(gpt.final_norm(x))


def export_program(model: GPT) -> torch.export.ExportedProgram:
    """The model's graph, `tokens` (B, T) int64 -> logits (B, T, V), for any B and T.

    T is from 1 to context_length; its weights are those of the model. UserError for a model with
    hooks, or with other modules than GPT makes: what they compute the graph would not have.
    """
    try:
        engine.weights_of(model, device=None)
    except engine.NotPlainError as error:
        raise UserError(f"a graph is made of a model as GPT builds it, but {error}") from None
    longest = model.config.context_length
    example = torch.zeros(
        2, min(2, longest), dtype=torch.int64, device=model.final_norm.weight.device
    )
    dims = {0: torch.export.Dim("B")}
    if longest > 1:
        dims[1] = torch.export.Dim("T", max=longest)
    with dropout_off(model):
        return torch.export.export(
            PlainGPT(model).eval(), (example,), dynamic_shapes={"tokens": dims}
        )


def save_program(model: GPT, path: Path) -> None:
    """Writes what torch.export.load reads."""
    buffer = io.BytesIO()
    torch.export.save(export_program(model), buffer)
    write_whole(path, buffer.getvalue())


def save_onnx(model: GPT, path: Path) -> None:
    """Writes the graph as ONNX, `tokens` -> `logits`, its weights inside.

    UserError where onnxscript is missing, or where the weights take more than ONNX's 2 GiB a file.
    """
    try:
        import onnxscript  # noqa: F401
    except ImportError:
        raise UserError(
            "ONNX takes the packages onnx and onnxscript: pip install 'gpt-ext[onnx]'"
        ) from None
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    if size >= ONNX_LIMIT:
        raise UserError(f"an ONNX file holds up to 2 GiB, and the weights take {size:,} bytes")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's exporter warns, and logs, of its own code
        logging.disable(logging.WARNING)
        try:
            exported = torch.onnx.export(
                export_program(model), input_names=["tokens"], output_names=["logits"],
                dynamo=True, verbose=False,
            )  # fmt: skip
        finally:
            logging.disable(logging.NOTSET)
    assert exported is not None
    write_whole(path, exported.model_proto.SerializeToString())
