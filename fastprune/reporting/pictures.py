"""Pictures, as PNG or whatever the file's name asks for."""

from collections.abc import Mapping
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
