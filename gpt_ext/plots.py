"""Pictures, by matplotlib: the curves of a run."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gpt_ext.checkpoint import write_whole
from gpt_ext.errors import UserError

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
