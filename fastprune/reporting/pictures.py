"""Pictures, as PNG or whatever the file's name asks for."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor


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
