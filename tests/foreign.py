"""Models of ours and of Hugging Face that tell their weights from others, and their logits."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from compare import assert_as_good_as_torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()  # it warns of ids of tokens that these have not

SIZES = dict(vocab_size=20, context_length=16, model_dim=24, num_blocks=3, num_heads=4)
TOKENS = torch.arange(2 * 16).reshape(2, 16) % 20


def shaken(model: nn.Module) -> Any:
    """The model with no weight at its trivial start, such as biases of zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 8)
    return model.eval()


def logits(model: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    """Of TOKENS; the model stays float32."""
    with torch.no_grad():
        found = model.to(dtype)(TOKENS)
        model.float()
        return found if isinstance(found, Tensor) else found.logits


def assert_same_logits(ours: Any, theirs: Any, exact: Any = None) -> None:
    """By the tolerance rule, against `exact`, theirs unless given, in float64."""
    reference = logits(theirs if exact is None else exact, torch.float64)
    assert_as_good_as_torch(["logits"], [logits(ours)], [logits(theirs)], [reference])


def hugging_face(**options: Any) -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=20, n_positions=16, n_embd=24, n_layer=3, n_head=4, resid_pdrop=0.25, **options
    )
    return shaken(GPT2LMHeadModel(config))
