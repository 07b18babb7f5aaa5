"""Who generates text in bench_generate.py: one class each, every one in a process of its own."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Protocol, cast

from torch import Tensor

from gpt_ext import GPT


class Generator(Protocol):
    """A model ready to generate on torch.get_num_threads() threads, `batch` rows at a time."""

    def __init__(self, model: GPT, dtype: str, batch: int) -> None: ...

    def generate(self, prompt: Tensor, new: int) -> Tensor:
        """The `new` likeliest tokens (B, new) int64, one after the other, after prompt (B, T)."""
        ...


@dataclass(frozen=True)
class Entry:
    """A contestant: the class Generator of generators/`module`.py or the one named, at a dtype.

    `weight_bytes` is what one weight takes. `slides`: it goes on past the context, its window
    recomputed for every token, as the model's learned positions demand.
    """

    module: str
    kind: str
    dtype: str
    weight_bytes: float
    slides: bool = False

    def make(self, model: GPT, batch: int) -> Generator:
        """Raises ImportError where the package is missing, ValueError for what it can't express."""
        kind = getattr(importlib.import_module(f"generators.{self.module}"), self.kind)
        return cast(Generator, kind(model, self.dtype, batch))


ENTRIES = {
    "gpt_ext": Entry("with_torch", "Ours", "float32", 4, slides=True),
    "gpt_ext bf16": Entry("with_torch", "Ours", "bfloat16", 2, slides=True),
    "gpt_ext int8": Entry("with_torch", "Ours", "int8", 1, slides=True),
    "seed as written": Entry("with_torch", "Seed", "float32", 4, slides=True),
    "torch, no cache": Entry("with_torch", "Uncached", "float32", 4, slides=True),
    "torch, KV cache": Entry("with_torch", "Cached", "float32", 4),
    "transformers": Entry("with_transformers", "Transformers", "float32", 4),
    "ctranslate2": Entry("with_ctranslate2", "CTranslate2", "float32", 4),
    "ctranslate2 int8": Entry("with_ctranslate2", "CTranslate2", "int8", 1),
    "onnxruntime": Entry("with_onnxruntime", "OnnxRuntime", "float32", 4),
    "onnxruntime int8": Entry("with_onnxruntime", "OnnxRuntime", "int8", 1),
    "llama.cpp f32": Entry("with_llama_cpp", "LlamaCpp", "F32", 4),
    "llama.cpp f16": Entry("with_llama_cpp", "LlamaCpp", "F16", 2),
    "llama.cpp bf16": Entry("with_llama_cpp", "LlamaCpp", "BF16", 2),
    "llama.cpp q8_0": Entry("with_llama_cpp", "LlamaCpp", "Q8_0", 34 / 32),
}
