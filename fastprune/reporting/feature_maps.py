"""Feature maps of the channels that a ranking finds the most and the least important."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..methods import DirichletRanks
from ..methods.objective import undisturbed
from .pictures import figure


def plot_feature_maps(
    model: nn.Module,
    ranks: DirichletRanks,
    images: Any,
    path: str | Path,
    *,
    layer: str,
    count: int = 4,
    examples: int = 4,
    module: str | None = None,
    title: str = "",
) -> None:
    """What a layer's `count` most and `count` least important channels make of images.

    Maps of one image share their colours, which are symmetric around 0, so faint maps are weak
    channels. The model runs once in evaluation mode and is left as it was.

    Args:
        ranks: what `fp.dirichlet` returned for this model.
        images: a batch [N, C, H, W], or a tuple of the model's arguments that begins with one.
        layer: a name in `ranks`.
        examples: how many images of the batch are shown.
        module: the name of the module whose output is shown, for instance the activation behind
            the layer; by default the layer itself.
    """
    arguments = images if isinstance(images, tuple) else (images,)
    if layer not in ranks:
        raise ValueError(f"layer must be one of {list(ranks)}, got {layer!r}")
    for name, number in (("count", count), ("examples", examples)):
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    order, factors = ranks[layer], ranks.mean[layer] * len(ranks[layer])
    maps = _output_of(model, arguments, module or layer, len(order))
    count = min(count, len(order) // 2)
    examples = min(examples, len(maps))
    sides = {"most important": order[:count].tolist(), "least important": order[-count:].tolist()}
    size = (1.15 * (2 * count + 1) + 1.2, 1.25 * examples + 1.0)
    drawing, axes = figure(examples, 2 * count + 1, size, squeeze=False)
    channels = [(channel, side) for side, part in sides.items() for channel in part]
    for example, row in enumerate(axes):
        _show(row[0], _picture(arguments[0][example]), cmap="gray")
        row[0].set_ylabel(f"image {example}")
        limit = max(float(maps[example, [c for c, _ in channels]].abs().max()), 1e-12)
        for panel, (channel, _) in zip(row[1:], channels, strict=True):
            shown = _show(panel, maps[example, channel], cmap="RdBu_r", vmin=-limit, vmax=limit)
        bar = drawing.colorbar(shown, ax=list(row), shrink=0.85)
        bar.ax.tick_params(labelsize="x-small")
        bar.set_label("output", fontsize="x-small")
    axes[0, 0].set_title("input", fontsize="small")
    for panel, (channel, side) in zip(axes[0, 1:], channels, strict=True):
        text = f"channel {channel}\nswitch {float(factors[channel]):.2f}"
        panel.set_title(f"{side}\n{text}" if channel == sides[side][0] else text, fontsize="small")
    drawing.suptitle(title or f"feature maps of {module or layer}")
    drawing.savefig(path, dpi=150)


def _output_of(
    model: nn.Module, arguments: tuple[Any, ...], name: str, num_channels: int
) -> Tensor:
    found: list[Tensor] = []
    with undisturbed(model), torch.no_grad():
        model.eval()
        target = model.get_submodule(name)
        # A copy: an activation behind it may work in place.
        keep = lambda m, a, output: found.append(output.detach().float().cpu().clone())  # noqa: E731
        handle = target.register_forward_hook(keep)
        try:
            model(*arguments)
        finally:
            handle.remove()
    shape = tuple(found[0].shape) if found else None
    if shape is None or len(shape) != 4 or shape[1] != num_channels:
        raise ValueError(
            f"{name} must give maps [N, {num_channels}, H, W] to be shown, it gives {shape}"
        )
    return found[0]


def _show(panel: Any, picture: Tensor, **options: Any) -> Any:
    panel.set(xticks=[], yticks=[])
    return panel.imshow(picture.numpy(), interpolation="nearest", **options)


def _picture(image: Tensor) -> Tensor:
    """[H, W] or [H, W, 3] between 0 and 1, whatever the data was normalized by."""
    image = image.detach().float().cpu()
    image = image.movedim(0, -1) if len(image) == 3 else image[0]
    low, high = image.min(), image.max()
    return (image - low) / (high - low).clamp_min(1e-12)
