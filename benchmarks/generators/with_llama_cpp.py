"""llama.cpp through llama-cpp-python's C functions: the model as a GGUF file of its GPT-2.

llama.cpp's GPT-2 has tanh-GELU alone: with another activation it computes another function of the
same cost.
"""

from __future__ import annotations

import ctypes
import tempfile
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import torch
from gguf import GGMLQuantizationType as Quantization
from models import blocks_of
from torch import Tensor

from gpt_ext import GPT

SILENT = llama_cpp.llama_log_callback(lambda level, text, data: None)


class LlamaCpp:
    def __init__(self, model: GPT, dtype: str, batch: int) -> None:
        config = model.config
        if dtype == "Q8_0" and config.model_dim % 32:
            raise ValueError("q8_0 has blocks of 32, which must divide model_dim")
        llama_cpp.llama_log_set(SILENT, None)
        llama_cpp.llama_backend_init()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.gguf"
            write_gguf(model, path, Quantization[dtype])
            parameters = llama_cpp.llama_model_default_params()
            parameters.use_mmap = False  # the file goes
            self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = batch * config.context_length
        parameters.n_batch = parameters.n_ubatch = batch * config.context_length
        parameters.n_seq_max = batch
        parameters.n_threads = parameters.n_threads_batch = torch.get_num_threads()
        if dtype == "F32":
            parameters.type_k = parameters.type_v = int(Quantization.F32)
        self.context = llama_cpp.llama_init_from_model(self.model, parameters)
        if not self.context:
            raise ValueError("llama.cpp can't run this model")
        self.batch = llama_cpp.llama_batch_init(batch * config.context_length, 0, 1)
        self.vocab_size = config.vocab_size

    def decode(self, tokens: list[list[int]], start: int) -> list[list[int]]:
        """The likeliest token [[token] a row] after `tokens`, which stand from `start` on."""
        batch, n = self.batch, 0
        for row, of_row in enumerate(tokens):
            for i, token in enumerate(of_row):
                batch.token[n], batch.pos[n] = token, start + i
                batch.n_seq_id[n], batch.seq_id[n][0] = 1, row
                batch.logits[n] = i == len(of_row) - 1
                n += 1
        batch.n_tokens = n
        if status := llama_cpp.llama_decode(self.context, batch):
            raise RuntimeError(f"llama_decode returned {status}")
        ends = [(row + 1) * len(tokens[0]) - 1 for row in range(len(tokens))]
        return [[self.likeliest(end)] for end in ends]

    def likeliest(self, place: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(self.context, place)
        values = np.ctypeslib.as_array(
            ctypes.cast(logits, ctypes.POINTER(ctypes.c_float)), (self.vocab_size,)
        )
        return int(values.argmax())

    def generate(self, prompt: Tensor, new: int) -> Tensor:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), False)
        tokens, start = [prompt.tolist()], 0
        for _ in range(new):
            tokens.append(self.decode(tokens[-1], start))
            start += len(tokens[-2][0])
        return torch.cat([torch.tensor(step) for step in tokens[1:]], dim=1)


def write_gguf(model: GPT, path: Path, dtype: Quantization) -> None:
    """Matrices in `dtype`; vectors and positions in float32, as llama.cpp's own converter does."""
    config = model.config
    writer: Any = gguf.GGUFWriter(path, "gpt2")
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(config.model_dim)
    writer.add_feed_forward_length(4 * config.model_dim)
    writer.add_block_count(config.num_blocks)
    writer.add_head_count(config.num_heads)
    writer.add_layer_norm_eps(1e-5)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")

    def add(name: str, module: Any, bias: bool = True) -> None:
        weight = module.weight.detach().numpy()
        if weight.ndim == 1 or name == "position_embd":
            writer.add_tensor(f"{name}.weight", weight)
        else:
            quantized = gguf.quants.quantize(weight, dtype)
            writer.add_tensor(f"{name}.weight", quantized, raw_dtype=dtype)
        if bias:
            zeros = np.zeros(len(weight), np.float32)
            value = zeros if module.bias is None else module.bias.detach().numpy()
            writer.add_tensor(f"{name}.bias", value)

    add("token_embd", model.token_embedding, bias=False)
    add("position_embd", model.position_embedding, bias=False)
    add("output_norm", model.final_norm)
    add("output", model.vocab_projection, bias=False)
    for i, block in enumerate(blocks_of(model)):
        add(f"blk.{i}.attn_norm", block.attention_norm)
        add(f"blk.{i}.attn_qkv", block.attention.qkv)
        add(f"blk.{i}.attn_output", block.attention.projection)
        add(f"blk.{i}.ffn_norm", block.feed_forward_norm)
        add(f"blk.{i}.ffn_up", block.feed_forward.up)
        add(f"blk.{i}.ffn_down", block.feed_forward.down)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
