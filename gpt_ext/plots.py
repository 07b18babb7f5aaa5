"""Pictures, by matplotlib: the curves of a run, and what its model looks at."""

from __future__ import annotations

import io
import itertools
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt_ext.checkpoint import write_whole
from gpt_ext.errors import UserError
from gpt_ext.generation import dropout_off
from gpt_ext.model import GPT

# What is drawn below each other: title of the axis, and key, label and style of its lines.
CURVES: list[tuple[str, list[tuple[str, str | None, str]]]] = [
    (
        "loss (nats a token)",
        [("loss", "training", "-"), ("validation_loss", "validation", "o-")],
    ),
    ("learning rate", [("learning_rate", None, "-")]),
    ("gradient norm", [("gradient_norm", None, "-")]),
]


def new_figure(width: float, height: float) -> Any:
    """An empty figure, in inches; UserError where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("no pictures without matplotlib: pip install 'gpt-ext[plot]'") from None
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Any, path: Path) -> None:
    """Writes a figure as PNG."""
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150)
    write_whole(path, image.getvalue())


def draw_curves(metrics: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Losses, learning rate and gradient norm by step, as a PNG; UserError without matplotlib."""
    metrics = list(metrics)
    figure = new_figure(7, 8)
    all_axes = figure.subplots(len(CURVES), sharex=True, height_ratios=[2, 1, 1])
    for axes, (title, lines) in zip(all_axes, CURVES, strict=True):
        axes.set_ylabel(title)
        for key, label, style in lines:
            # null stands for what was not finite: a gap
            points = [(record["step"], record[key]) for record in metrics if key in record]
            x, y = (
                [step for step, _ in points],
                [float("nan") if v is None else v for _, v in points],
            )
            axes.plot(x, y, style, label=label, markersize=3)
    all_axes[0].legend()
    all_axes[-1].set_xlabel("step")
    save_figure(figure, path)


def attention_weights(model: GPT, tokens: Tensor) -> Tensor:
    """What each of `tokens` (T,) takes from each: (layers, heads, T, T), rows that add up to 1.

    They are those of the model as it reads the tokens, dropout off. ValueError for no tokens or for
    more than the context.
    """
    return read(model, tokens)[0]


@torch.no_grad()
def read(model: GPT, tokens: Tensor, queries: slice = slice(None)) -> tuple[Tensor, Tensor]:
    """The `attention_weights` of `tokens`, and what the blocks make of them: (T, C).

    Of the weights only the rows of `queries` are kept.
    """
    if not len(tokens):
        raise ValueError("there is nothing to look at")
    maps = []

    def attend(qkv: Tensor) -> Tensor:  # (B, T, 3, H, D) -> (B, T, H, D)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # (B, H, T, D)
        scores = q @ k.mT / q.shape[-1] ** 0.5
        future = torch.ones_like(scores, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(future, -torch.inf).softmax(-1)
        maps.append(weights[0, :, queries].clone())  # a view would keep all rows
        return (weights @ v).transpose(1, 2)

    with dropout_off(model):
        x = model.embed(tokens[None])
        for block in model.blocks:
            x = block(x, attend)
    return torch.stack(maps), x[0]


def draw_attention(weights: Tensor, labels: Sequence[str], path: Path) -> None:
    """A map a head, layers from top to bottom, as PNG; UserError where matplotlib is missing.

    `weights` (layers, heads, T, T), `labels` the text of each of the T tokens.
    """
    layers, heads, count, _ = weights.shape
    size = max(1.6, 0.11 * count)  # inches a map: room for a label a token
    figure = new_figure(0.6 + heads * size, 0.8 + layers * size)
    figure.suptitle("rows look at columns: from white, not at all, to dark, at nothing else")
    grid = figure.subplots(layers, heads, squeeze=False, sharex=True, sharey=True)
    shown = [label.replace("\n", "↵").replace(" ", "␣") for label in labels]
    for layer, head in itertools.product(range(layers), range(heads)):
        axes = grid[layer, head]
        axes.imshow(weights[layer, head].numpy(), cmap="Blues", vmin=0, vmax=1)
        axes.set_xticks(range(count), shown, fontsize=6)
        axes.set_yticks(range(count), shown, fontsize=6)
        axes.tick_params(length=0)
        if layer == 0:
            axes.set_title(f"head {head}", fontsize=8)
        if head == 0:
            axes.set_ylabel(f"layer {layer}", fontsize=8)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph", UserWarning)  # the font has not all the world's
        save_figure(figure, path)
