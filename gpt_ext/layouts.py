"""State dicts of other projects: recognised by their keys, renamed and reshaped into our own.

One row a layout: where the file keeps each of our modules. The closest row is the one with the
fewest missing and unexpected keys; it converts only if there are none. What a layout has no tensor
for is filled in so that the maths stays the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from gpt_ext.model import GPTConfig


@dataclass(frozen=True)
class Layout:
    """One way of naming the weights of a GPT.

    `modules`: our name -> the file's, with {i} for the block; a file that keeps a layer for each
    head has {j} for the head and {part} for query, key and value. `absent`: pattern of the keys of
    ours that a file may lack. `ignored`: pattern of the file's keys that hold no weight.
    `transposed`: the weights inside blocks are stored (in, out). `activation`: implied, if any.
    """

    name: str
    modules: dict[str, str]
    absent: str = r".*\.qkv\.bias"
    ignored: str = r"(?!)"
    transposed: bool = False
    activation: str | None = "relu"


OWN = Layout(
    "gpt_ext",
    {
        name: name
        for name in (
            "token_embedding",
            "position_embedding",
            "blocks.{i}.attention_norm",
            "blocks.{i}.attention.qkv",
            "blocks.{i}.attention.projection",
            "blocks.{i}.feed_forward_norm",
            "blocks.{i}.feed_forward.up",
            "blocks.{i}.feed_forward.down",
            "final_norm",
            "vocab_projection",
        )
    },
    activation=None,
)

COURSE = Layout(
    "course (mhsa, vanilla_nn)",
    {
        "token_embedding": "token_embedding",
        "position_embedding": "pos_embedding",
        "blocks.{i}.attention_norm": "transformer_blocks.{i}.layer_norm_one",
        "blocks.{i}.attention.qkv": "transformer_blocks.{i}.mhsa.attention_heads.{j}.{part}_layer",
        "blocks.{i}.attention.projection": "transformer_blocks.{i}.mhsa.compute",
        "blocks.{i}.feed_forward_norm": "transformer_blocks.{i}.layer_norm_two",
        "blocks.{i}.feed_forward.up": "transformer_blocks.{i}.vanilla_nn.first_linear_layer",
        "blocks.{i}.feed_forward.down": "transformer_blocks.{i}.vanilla_nn.second_linear_layer",
        "final_norm": "layer_norm_three",
        "vocab_projection": "vocab_projection",
    },
)

NEWER_COURSE = Layout(
    "newer course (att_heads, linear_network)",
    {
        "token_embedding": "word_embeddings",
        "position_embedding": "position_embeddings",
        "blocks.{i}.attention_norm": "transformer_blocks.{i}.first_norm",
        "blocks.{i}.attention.qkv": "transformer_blocks.{i}.attention.att_heads.{j}.{part}_gen",
        "blocks.{i}.feed_forward_norm": "transformer_blocks.{i}.second_norm",
        "blocks.{i}.feed_forward.up": "transformer_blocks.{i}.linear_network.up_projection",
        "blocks.{i}.feed_forward.down": "transformer_blocks.{i}.linear_network.down_projection",
        "final_norm": "final_norm",
        "vocab_projection": "vocab_projection",
    },
)

NEWER_COURSE_PROJECTED = Layout(
    "newer course with output_proj",
    NEWER_COURSE.modules
    | {"blocks.{i}.attention.projection": "transformer_blocks.{i}.attention.output_proj"},
    absent=r".*\.(qkv|projection)\.bias",
)

NANOGPT = Layout(
    "nanoGPT",
    {
        "token_embedding": "wte",
        "position_embedding": "wpe",
        "blocks.{i}.attention_norm": "h.{i}.ln_1",
        "blocks.{i}.attention.qkv": "h.{i}.attn.c_attn",
        "blocks.{i}.attention.projection": "h.{i}.attn.c_proj",
        "blocks.{i}.feed_forward_norm": "h.{i}.ln_2",
        "blocks.{i}.feed_forward.up": "h.{i}.mlp.c_fc",
        "blocks.{i}.feed_forward.down": "h.{i}.mlp.c_proj",
        "final_norm": "ln_f",
        "vocab_projection": "lm_head",
    },
    absent=r".*\.bias|vocab_projection\.weight",
    ignored=r"h\.\d+\.attn\.(bias|masked_bias)",
    activation="gelu",
)

GPT2 = Layout(
    "GPT-2",
    NANOGPT.modules,
    absent=r"vocab_projection\.(weight|bias)",
    ignored=NANOGPT.ignored,
    transposed=True,
    activation="gelu_tanh",
)

LAYOUTS = (OWN, COURSE, NEWER_COURSE, NEWER_COURSE_PROJECTED, NANOGPT, GPT2)


class UnknownLayoutError(RuntimeError):
    """The keys of a state dict are those of no layout here."""


class Reading(NamedTuple):
    """A state dict under our names, and the arguments of GPT that its file tells."""

    layout: str
    weights: dict[str, Tensor]
    arguments: dict[str, Any]


def read(file: Mapping[str, Any]) -> Reading:
    """What is in `file`, with what its layout has no tensor for filled in.

    Raises TypeError for what is no state dict, UnknownLayoutError, naming the closest layout, where
    keys are missing or unexpected.
    """
    weights, declared = unwrap(file)
    blocks = _count(r"(?:^|\.)(?:blocks|h|transformer_blocks)\.(\d+)\.", weights)
    heads = _count(r"\.(?:attention_heads|att_heads)\.(\d+)\.", weights)
    layout, missing, unexpected = _closest(weights, blocks, heads)
    if missing or unexpected:
        raise UnknownLayoutError(
            f"the state dict is of no known layout; closest is {layout.name}, "
            f"with {_listed('missing', missing)} and {_listed('unexpected', unexpected)}"
        )
    own = {
        key: _converted(weights, parts, layout.transposed and "blocks" in key)
        for key, parts in _sources(layout, blocks, heads).items()
        if parts[0] in weights
    }
    tokens, positions = own["token_embedding.weight"], own["position_embedding.weight"]
    for name, table in (("token", tokens), ("position", positions)):
        if table.dim() != 2:
            raise TypeError(f"{name}_embedding.weight has shape {tuple(table.shape)}, expected 2-D")
    arguments = {
        "vocab_size": tokens.shape[0],
        "context_length": positions.shape[0],
        "model_dim": tokens.shape[-1],
        "num_blocks": blocks,
        **declared,
        **({"num_heads": heads} if heads else {}),
        **({"activation": layout.activation} if layout.activation else {}),
        "qkv_bias": "blocks.0.attention.qkv.bias" in own,
    }
    _fill(own, blocks)
    return Reading(layout.name, own, arguments)


def to_own_layout(file: Mapping[str, Any], config: GPTConfig, strict: bool) -> dict[str, Tensor]:
    """The weights of `file` under our names, for a model of `config`.

    Raises RuntimeError where the file wants other arguments of GPT, and, if `strict`, where keys
    are missing or unexpected; if not, such a file comes back under its own names.
    """
    try:
        layout, own, told = read(file)
    except UnknownLayoutError:
        if strict:
            raise
        return unwrap(file)[0]
    wanted = told | {"dropout": config.dropout, "qkv_bias": told["qkv_bias"] or config.qkv_bias}
    differing = [name for name, value in wanted.items() if value != getattr(config, name)]
    if differing:
        raise RuntimeError(
            f"this {layout} state dict wants GPT({_arguments(wanted, differing)}), "
            f"the model has ({_arguments(vars(config), differing)})"
        )
    if config.qkv_bias:
        for i in range(config.num_blocks):
            weight = own[f"blocks.{i}.attention.qkv.weight"]
            own.setdefault(f"blocks.{i}.attention.qkv.bias", weight.new_zeros(len(weight)))
    return own


def unwrap(file: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The bare state dict inside a checkpoint, and arguments of GPT, where it tells them.

    Looks through `model`, `model_state_dict` and `state_dict`, and drops what torch.compile,
    DataParallel and GPT-2's class put before names: `_orig_mod.`, `module.`, `transformer.`.
    """
    declared = {}
    wrappers = ("model", "model_state_dict", "state_dict")
    while isinstance(file, Mapping) and (inner := [w for w in wrappers if w in file]):
        arguments = file.get("model_args", {})  # nanoGPT's
        for theirs, ours in (("n_head", "num_heads"), ("dropout", "dropout")):
            if theirs in arguments:
                declared[ours] = arguments[theirs]
        file = file[inner[0]]
    if not isinstance(file, Mapping) or not all(isinstance(v, Tensor) for v in file.values()):
        raise TypeError("expected a state dict, names -> tensors, or a checkpoint that holds one")
    prefix = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|module)\.")
    weights = {prefix.sub("", key).removeprefix("transformer."): v for key, v in file.items()}
    return weights, declared


def _closest(
    weights: Mapping[str, Tensor], blocks: int, heads: int
) -> tuple[Layout, list[str], list[str]]:
    """The layout nearest to `weights`, and the file's names that it misses and doesn't expect."""
    conv1d = any(
        key.endswith("attn.c_attn.weight") and value.shape[-1] == 3 * value.shape[0]
        for key, value in weights.items()
    )
    best = None
    for layout in LAYOUTS:
        sources = _sources(layout, max(blocks, 1), max(heads, 1))
        missing = [
            part
            for key, parts in sources.items()
            for part in parts
            if part not in weights
            and not (re.fullmatch(layout.absent, key) and not any(p in weights for p in parts))
        ]
        known = {part for parts in sources.values() for part in parts}
        unexpected = [
            key for key in weights if key not in known and not re.fullmatch(layout.ignored, key)
        ]
        mistakes = (layout.transposed != conv1d, len(missing) + len(unexpected))
        if best is None or mistakes < best[0]:
            best = mistakes, (layout, missing, unexpected)
    assert best is not None
    return best[1]


def _sources(layout: Layout, blocks: int, heads: int) -> dict[str, list[str]]:
    """Our key -> the file's keys whose tensors, stacked by rows, are its value."""
    sources = {}
    for ours, theirs in layout.modules.items():
        split = "{j}" in theirs
        for i in range(blocks if "{i}" in ours else 1):
            for kind in ("weight",) if ours.endswith("embedding") else ("weight", "bias"):
                sources[f"{ours.format(i=i)}.{kind}"] = [
                    f"{theirs.format(i=i, part=part, j=j)}.{kind}"
                    for part in (("query", "key", "value") if split else ("",))
                    for j in range(heads if split else 1)
                ]
    return sources


def _converted(weights: Mapping[str, Tensor], parts: list[str], transposed: bool) -> Tensor:
    """The parts stacked by rows; 2-D ones first turned to (out, in) where stored (in, out)."""
    tensors = [weights[part] for part in parts]
    whole = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
    return whole.t() if transposed and whole.dim() == 2 else whole


def _fill(own: dict[str, Tensor], blocks: int) -> None:
    """Adds what the file has no tensor for: zero biases, identity projections, the tied head."""
    tokens = own["token_embedding.weight"]
    own.setdefault("vocab_projection.weight", tokens.clone())
    for i in range(blocks):
        eye = torch.eye(tokens.shape[-1], dtype=tokens.dtype, device=tokens.device)
        own.setdefault(f"blocks.{i}.attention.projection.weight", eye)
    for key, weight in list(own.items()):
        if "embedding" not in key and "qkv" not in key:
            own.setdefault(key.replace(".weight", ".bias"), weight.new_zeros(weight.shape[0]))


def _count(pattern: str, keys: Iterable[str]) -> int:
    """One more than the largest index that `pattern` finds in `keys`; 0 if it finds none."""
    return max((int(m[1]) + 1 for key in keys if (m := re.search(pattern, key))), default=0)


def _listed(word: str, keys: list[str]) -> str:
    """'2 missing (a, b)', cut after five."""
    if not keys:
        return f"none {word}"
    return f"{len(keys)} {word} ({', '.join(keys[:5])}{', ...' if len(keys) > 5 else ''})"


def _arguments(values: Mapping[str, Any], names: list[str]) -> str:
    return ", ".join(f"{name}={values[name]!r}" for name in names)
