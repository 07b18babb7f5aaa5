"""What a model takes: parameters, memory, arithmetic, and time on this machine."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

from gpt_ext.model import GPT, GPTConfig


def parameters(model: GPT) -> dict[str, int]:
    """How many parameters each kind of part has."""
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        kind = parts[2] if parts[0] == "blocks" else parts[0]
        counts["norms" if kind.endswith("norm") else kind.replace("_", " ")] += parameter.numel()
    return dict(counts)


def forward_flops(config: GPTConfig) -> int:
    """Floating-point operations a token of a whole context, in products: 2 a multiply-add.

    The linear layers of a block have 12 C² weights, the vocabulary projection C V; of its context a
    token's attention multiplies (T + 1) / 2 keys and values on average. Backward takes twice that.
    """
    dim, length = config.model_dim, config.context_length
    weights = config.num_blocks * 12 * dim**2 + dim * config.vocab_size
    return 2 * weights + config.num_blocks * 2 * (length + 1) * dim


def activation_bytes(model: GPT, objective: Callable[[Tensor, Tensor], Tensor]) -> int:
    """What backward needs of one sequence of a whole context, beside the parameters: measured."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens = torch.zeros(1, model.config.context_length, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        objective(tokens, tokens)
    return sum(kept.values())


def calls_a_second(call: Callable[[], object], seconds: float = 1.0) -> float:
    """How often a second `call` can be made, from calls for so long after a first one."""
    call()
    begin = time.perf_counter()
    for calls in itertools.count(1):
        call()
        if (passed := time.perf_counter() - begin) >= seconds:
            return calls / passed
    raise AssertionError("itertools.count has no end")
