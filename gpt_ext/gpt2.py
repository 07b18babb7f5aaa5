"""Hugging Face's GPT-2: folders of it in, and out where the architectures agree.

In: its head is the token embedding, of which ours becomes a copy, with a zero bias. Out: its head
has no bias, so ours must go into the bias of the final norm: W (n g + b) + c = W (n g + b + d) with
W d = c, which has a solution where the vocabulary is not larger than the width, as a rule.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gpt_ext import layouts
from gpt_ext.errors import UserError
from gpt_ext.pretrained import check_eps, read_weights, write_folder

if TYPE_CHECKING:
    from gpt_ext.model import GPT
    from gpt_ext.tokenizer import Tokenizer

ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
FILES = ("model.safetensors", "pytorch_model.bin")

# Options of GPT2Config that change what is computed, with the one value that GPT computes.
FIXED = {
    "add_cross_attention": False,
    "layer_norm_epsilon": 1e-5,
    "scale_attn_by_inverse_layer_idx": False,
    "scale_attn_weights": True,
}


def arguments_of(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The arguments of GPT that a GPT-2's config.json tells; UserError for what GPT is not."""
    for name, value in FIXED.items():
        if config.get(name, value) != value:
            raise UserError(f"{path}: {name} is {config[name]!r}, and GPT computes {value!r}")
    inner = config.get("n_inner")
    activation = config.get("activation_function", "gelu_new")
    try:
        if inner not in (None, 4 * config["n_embd"]):
            raise UserError(f"{path}: n_inner is {inner}, and GPT has 4 n_embd")
        if activation not in ACTIVATIONS:
            raise UserError(
                f"{path}: activation_function is {activation!r}, expected one of "
                f"{', '.join(ACTIVATIONS)}"
            )
        return {
            "vocab_size": config["vocab_size"],
            "context_length": config["n_positions"],
            "model_dim": config["n_embd"],
            "num_blocks": config["n_layer"],
            "num_heads": config["n_head"],
            "dropout": config.get("resid_pdrop", 0.1),
            "activation": ACTIVATIONS[activation],
        }
    except KeyError as error:
        raise UserError(f"{path} is damaged: it has no {error}") from None


def read_folder(folder: Path) -> dict[str, Any]:
    """The weights in a folder, of one file or of those of an index; UserError if there are none."""
    for name in FILES:
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return dict(read_weights(folder / name))
        if index.is_file():
            try:
                shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
                names = [Path(shard).name for shard in shards]  # and nothing outside the folder
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{index} is damaged: {error}") from None
            return {k: v for name in names for k, v in read_weights(folder / name).items()}
    raise UserError(f"{folder} holds none of {', '.join(FILES)}")


def save(model: GPT, folder: Path, tokenizer: Tokenizer | None = None) -> None:
    """Writes a folder that transformers' GPT2LMHeadModel.from_pretrained loads.

    A tokenizer.json comes with it if it is of the library `tokenizers`. UserError where the bias of
    the vocabulary projection has no place in a GPT-2.
    """
    from gpt_ext.bpe import BPETokenizer

    check_eps(model)
    config = model.config
    weights = dict(model.state_dict())
    head, bias = weights["vocab_projection.weight"], weights.pop("vocab_projection.bias")
    weights["final_norm.bias"] = weights["final_norm.bias"] + _as_norm_bias(head, bias)
    theirs = layouts.GPT2.modules
    out = {}
    for key, value in weights.items():
        name, kind = key.rsplit(".", 1)
        block = name.split(".")[1] if name.startswith("blocks.") else ""
        name = name.replace(f".{block}.", ".{i}.", 1) if block else name
        renamed = f"{theirs[name].format(i=block)}.{kind}"
        prefix = "" if renamed.startswith("lm_head") else "transformer."
        out[prefix + renamed] = value.t() if block and value.dim() == 2 else value
    for i in range(config.num_blocks):
        out.setdefault(f"transformer.h.{i}.attn.c_attn.bias", head.new_zeros(3 * config.model_dim))
    keep = tokenizer if isinstance(tokenizer, BPETokenizer) else None
    write_folder(folder, _config_of(model), out, keep)


def _as_norm_bias(head: Tensor, bias: Tensor) -> Tensor:
    """d (C) with head d = bias, head (V, C); UserError if there is none."""
    if not bias.any():
        return head.new_zeros(head.shape[1])
    found = torch.linalg.lstsq(head.double(), bias.double()[:, None], driver="gelsd").solution[:, 0]
    found = found.to(head.dtype)
    error = (head.double() @ found.double() - bias.double()).abs().max().item()
    if not error <= 1e-5 * max(1.0, bias.abs().max().item()):
        raise UserError(
            "a GPT-2 has no bias in its vocabulary projection, and that of this model, "
            f"{head.shape[0]} numbers, can't be told by its final norm's {head.shape[1]}: "
            f"logits would be off by {error:.2g}; hold vocab_projection.bias at zero in training"
        )
    return found


def _config_of(model: GPT) -> dict[str, Any]:
    config = model.config
    activation = {"gelu_tanh": "gelu_new"}.get(config.activation, config.activation)
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": config.vocab_size,
        "n_positions": config.context_length,
        "n_embd": config.model_dim,
        "n_layer": config.num_blocks,
        "n_head": config.num_heads,
        "activation_function": activation,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": config.dropout,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        **FIXED,
    }
