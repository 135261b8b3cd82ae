"""A picture of what Dirichlet pruning believes about the channels of each layer."""

from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..methods import DirichletRanks
from .pictures import figure

POINTS = 4001  # of the grid that a distribution is summed on
COLUMNS = 4
KEPT, PRUNED = "tab:blue", "tab:orange"


def plot_posterior(
    ranks: DirichletRanks,
    path: str | Path,
    *,
    counts: Mapping[str, int] | None = None,
    layers: Sequence[str] | None = None,
    level: float = 0.95,
    title: str = "",
) -> None:
    """The switches of each layer: posterior mean and credible interval, the most important first.

    Values are multiplied by the layer's number of channels: 1 is a channel like all others.

    Args:
        counts: how many channels of a layer are kept, as `ranks.counts` says; they are marked.
        layers: names of the layers to show, all without it.
        level: the probability of the interval of each channel by itself.
    """
    names = _checked_names(ranks, layers)
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level}")
    columns = min(COLUMNS, len(names))
    rows = ceil(len(names) / columns)
    size = (max(6.0, 3.2 * columns), 2.6 * rows + 0.9)
    drawing, axes = figure(rows, columns, size, squeeze=False)
    for name, panel in zip(names, axes.flat, strict=False):
        _draw_layer(panel, ranks, name, (counts or {}).get(name), level)
    for panel in list(axes.flat)[len(names) :]:
        panel.remove()
    drawing.supylabel("switch, times the number of channels", fontsize="medium")
    handles = {text: handle for panel in drawing.axes for handle, text in _legend(panel)}
    drawing.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize="small"
    )
    drawing.suptitle(title)
    drawing.savefig(path, dpi=150)


def _draw_layer(
    panel: Any, ranks: DirichletRanks, name: str, kept: int | None, level: float
) -> None:
    order = ranks[name]
    size = len(order)
    low, high = (
        bound[order] * size for bound in credible_interval(ranks.concentration[name], level)
    )
    mean = ranks.mean[name][order] * size
    rank = torch.arange(1, size + 1)
    count = size if kept is None else kept
    parts = [(slice(0, count), KEPT, "kept" if kept is not None else "all")]
    if count < size:
        parts.append((slice(count, size), PRUNED, "pruned"))
        panel.axvline(count + 0.5, color="0.5", linewidth=0.8, linestyle=":")
    for part, color, word in parts:
        label = f"{level:.0%} credible interval, {word}"
        panel.vlines(rank[part], low[part], high[part], color, alpha=0.35, label=label)
        panel.plot(rank[part], mean[part], ".", color=color, markersize=4, label=f"mean, {word}")
    panel.axhline(1, color="0.7", linewidth=0.8, zorder=0, label="average channel")
    panel.set(xlim=(0, size + 1), ylim=(0, None))
    text = name if kept is None else f"{name}: {count} of {size} kept"
    panel.set_title(text, fontsize="medium")
    panel.set_xlabel("channel, the most important first", fontsize="small")


def _legend(panel: Any) -> list[tuple[Any, str]]:
    handles, texts = panel.get_legend_handles_labels()
    return list(zip(handles, texts, strict=True))


def credible_interval(concentration: Tensor, level: float) -> tuple[Tensor, Tensor]:
    """The central interval of each component: the marginals of a Dirichlet are Beta(a, b).

    The density of t = log(x / (1 - x)), proportional to exp(a t) / (1 + exp(t))^(a + b), is smooth
    with tails exp(a t) and exp(-b t), so that a plain sum over a grid of t is accurate.
    """
    a = concentration.double().unsqueeze(1)
    b = a.sum() - a
    width = (1 / a + 1 / b).sqrt()
    begin, end = -8 * width - 40 / a, 8 * width + 40 / b
    steps = torch.linspace(0, 1, POINTS, dtype=torch.float64)
    t = (a / b).log() + begin + (end - begin) * steps
    log_density = a * t - (a + b) * torch.nn.functional.softplus(t, threshold=40)
    mass = (log_density - log_density.amax(1, keepdim=True)).exp().cumsum(1)
    mass = mass / mass[:, -1:]
    bounds = []
    for p in ((1 - level) / 2, (1 + level) / 2):
        found = torch.searchsorted(mass, torch.full_like(a, p)).clamp(1, POINTS - 1)
        below, above = (mass.gather(1, i) for i in (found - 1, found))
        part = (p - below) / (above - below).clamp_min(1e-300)
        # A step's mass lies around its point, from half a step before it to half a step behind.
        at = t.gather(1, found - 1) + (part + 0.5) * (end - begin) / (POINTS - 1)
        bounds.append(at.sigmoid().squeeze(1))
    return bounds[0], bounds[1]


def _checked_names(ranks: DirichletRanks, layers: Sequence[str] | None) -> list[str]:
    if not isinstance(ranks, DirichletRanks):
        raise TypeError(f"ranks must be what fp.dirichlet returns, got {type(ranks).__name__}")
    for name in layers or ():
        if name not in ranks:
            raise ValueError(f"layers must name entries of the ranks, {list(ranks)}; got {name!r}")
    names = list(ranks if layers is None else layers)
    if not names:
        raise ValueError("layers must name at least one layer")
    return names
