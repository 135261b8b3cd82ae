"""Pictures, as PNG or whatever the file's name asks for."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import Tensor

from ..optim.aswl import History


def plot_losses(losses: Mapping[str, Tensor], path: str | Path, *, title: str = "") -> None:
    """The loss along each of several curves between two solutions, from their starts to their ends.

    `losses` are what `losses_along` returns, by the curve's name.
    """
    drawing, axes = figure()
    for name, values in losses.items():
        numbers = values.tolist()
        axes.plot([i / (len(numbers) - 1) for i in range(len(numbers))], numbers, label=name)
    axes.set(xlabel="way from the start to the end", ylabel="loss", title=title)
    axes.legend()
    drawing.savefig(path, dpi=150)


def plot_sparsities(history: History, path: str | Path, *, title: str = "") -> None:
    """The sparsity of each layer over time, as `ASWL.history()` returns it."""
    drawing, axes = figure()
    drawing.set_figheight(max(4.0, 0.18 * len(history.sparsities)))  # room for every name
    for name, values in history.sparsities.items():
        axes.plot(history.marks, values, label=name)
    axes.set(xlabel="time", ylabel="sparsity", ylim=(-0.02, 1.02), title=title)
    drawing.legend(loc="outside right upper", fontsize="small")
    drawing.savefig(path, dpi=150)


def plot_speed(
    speeds: Mapping[str, Sequence[tuple[float, float]]], path: str | Path, *, title: str = ""
) -> None:
    """How many times faster than dense over the sparsity, and from where on it is faster.

    `speeds` has pairs (sparsity, times faster) by the curve's name.
    """
    drawing, axes = figure()
    for name, points in speeds.items():
        start = break_even(points)
        label = name if start is None else f"{name}: faster from {start:.0%} on"
        (line,) = axes.plot(*zip(*sorted(points), strict=True), marker="o", label=label)
        if start is not None:
            axes.axvline(start, color=line.get_color(), linestyle=":")
    axes.axhline(1, color="gray")
    axes.set(xlabel="sparsity", ylabel="times faster than dense", title=title)
    axes.legend()
    drawing.savefig(path, dpi=150)


def break_even(points: Sequence[tuple[float, float]]) -> float | None:
    """The sparsity from which on it is faster, between two that were measured; None if unknown."""
    points = sorted(points)
    for (low, slow), (high, fast) in reversed(list(pairwise(points))):
        if slow < 1 <= fast:
            return low + (high - low) * (1 - slow) / (fast - slow)
    return None


def figure(
    rows: int = 1, columns: int = 1, size: tuple[float, float] = (6, 4), **options: Any
) -> tuple[Any, Any]:
    """Without pyplot, which would choose a window system and keep every figure."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'fastprune[report]'") from error
    drawing = Figure(figsize=size, layout="constrained")
    return drawing, drawing.subplots(rows, columns, **options)
