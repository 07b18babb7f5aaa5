"""Plots as small SVG files that are readable on light and on dark pages."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
from cycler import cycler

mpl.use("svg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

FOLDER = Path(__file__).parent / "plots"
INK = "#808080"  # contrasts with white and with black alike
COLORS = ["#d95f02", "#1b9e77", "#7570b3", "#e7298a", "#66a61e", "#a6761d", "#1f78b4"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X"]

plt.rcParams.update(
    {
        "svg.fonttype": "none",  # text stays text
        "svg.hashsalt": "gpt_ext",  # the same plot is the same file
        "axes.prop_cycle": cycler(color=COLORS) + cycler(marker=MARKERS),
        "axes.facecolor": "none",
        "axes.grid": True,
        "grid.alpha": 0.3,
        "legend.frameon": False,
        "legend.labelcolor": INK,
        "font.family": "sans-serif",
        "savefig.transparent": True,
        **dict.fromkeys(
            ["text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"], INK
        ),
        "grid.color": INK,
    }
)

Points = tuple[list[float], list[float]]  # x, y


def new_axes(title: str, x_label: str, y_label: str) -> Axes:
    """Axes of a new figure; labels carry the units."""
    axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")[1]
    axes.set(title=title, xlabel=x_label, ylabel=y_label)
    return axes


def save(axes: Axes, name: str) -> None:
    """Writes plots/`name`.svg and lets the figure go."""
    figure = axes.get_figure(root=True)
    if figure is None:
        raise ValueError("the axes belong to no figure")
    FOLDER.mkdir(exist_ok=True)
    figure.savefig(FOLDER / f"{name}.svg", metadata={"Date": None})
    plt.close(figure)


def plot_lines(
    name: str,
    title: str,
    x_label: str,
    y_label: str,
    lines: dict[str, Points],
    *,
    log_x: bool = False,
    log_y: bool = False,
) -> None:
    """One line for each entry, on axes that start at 0 where they are not logarithmic."""
    axes = new_axes(title, x_label, y_label)
    for label, (x, y) in lines.items():
        axes.plot(x, y, label=label)
    if log_x:
        axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({x for points in lines.values() for x in points[0]}))
    axes.minorticks_off()
    axes.xaxis.set_major_formatter("{x:g}")
    if log_y:
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter("{x:g}")
    else:
        axes.set_ylim(bottom=0)
    axes.legend()
    save(axes, name)
