"""Output channels of a layer: their part of its weight, and the bias and norm entries of each."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.module import register_module_forward_hook

from .objective import Tensors

# Weights of the layers in `structure.PRUNABLE`, and the biases that have the same rows.
BIASES: dict[str, str | None] = {
    "weight": "bias",
    "in_proj_weight": "in_proj_bias",
    "q_proj_weight": None,
    "k_proj_weight": None,
    "v_proj_weight": None,
}
NORMS = (_BatchNorm, _InstanceNorm, nn.GroupNorm, nn.LayerNorm)


class Layer(NamedTuple):
    """How a weight splits into output channels."""

    groups: int  # of a transposed convolution, weight [inputs, outputs / groups, ...]; others 0
    companions: tuple[str, ...]  # vectors with one entry per channel


def layers(model: nn.Module, names: list[str], run: Callable[[], Any]) -> dict[str, Layer]:
    """`run` calls the model once, which shows what norm follows which layer."""
    parameters = dict(model.named_parameters())
    names_of = {id(p): name for name, p in parameters.items() if p.requires_grad}
    found: dict[str, Layer] = {}
    owners: dict[nn.Module, str] = {}
    for path, module in model.named_modules():
        for attribute, bias in BIASES.items():
            name = f"{path}.{attribute}".lstrip(".")
            if name in names:
                groups = module.groups if isinstance(module, _ConvTransposeNd) else 0
                found[name] = Layer(groups, _vectors(module, names_of, bias))
                owners |= {module: name} if attribute == "weight" else {}
    for norm, owner in _followers(owners, run).items():
        vectors = _vectors(norm, names_of, "weight", "bias")
        count = num_channels(parameters[owner], found[owner])
        if all(parameters[vector].shape == (count,) for vector in vectors):
            own = found[owner].companions
            found[owner] = found[owner]._replace(companions=(*own, *vectors))
    return found


def _vectors(
    module: nn.Module, names_of: dict[int, str], *attributes: str | None
) -> tuple[str, ...]:
    """Those that are there and trained."""
    found = (getattr(module, attribute, None) for attribute in attributes if attribute)
    return tuple(names_of[id(p)] for p in found if id(p) in names_of)


def _followers(owners: dict[nn.Module, str], run: Callable[[], Any]) -> dict[nn.Module, str]:
    """Norms that take the output of one layer, unchanged and in each of their calls."""
    outputs: dict[int, tuple[Tensor, str]] = {}  # holds the tensors, so that ids stay theirs
    fed: dict[nn.Module, set[str | None]] = {}

    def look(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        if module in owners:
            outputs[id(output)] = output, owners[module]
        elif isinstance(module, NORMS) and arguments:
            _, owner = outputs.get(id(arguments[0]), (None, None))
            fed.setdefault(module, set()).add(owner)

    handle = register_module_forward_hook(look)  # of all modules: none of the model's is touched
    try:
        with torch.no_grad():
            run()
    finally:
        handle.remove()
    return {norm: owner for norm, of in fed.items() for owner in of if owner and len(of) == 1}


def num_channels(weight: Tensor, layer: Layer) -> int:
    return layer.groups * weight.shape[1] if layer.groups else weight.shape[0]


def channel_sums(scores: Tensors, name: str, layer: Layer) -> Tensor:
    """Over all that goes with a channel.

    A weight alone would not do: in front of a norm the loss is the same for any positive multiple
    of it, so the sum of weight * gradient is zero in each channel.
    """
    sums = _by_channel(scores[name], layer).flatten(1).sum(1)
    for vector in layer.companions:
        sums = sums + scores[vector]
    return sums


def _by_channel(scores: Tensor, layer: Layer) -> Tensor:
    if not layer.groups:
        return scores
    grouped = scores.view(layer.groups, -1, *scores.shape[1:])
    return grouped.transpose(1, 2).flatten(0, 1)


def channel_mask(kept: Tensor, weight: Tensor, layer: Layer) -> Tensor:
    """One bool per channel, spread over the weight."""
    ones = (1,) * (weight.dim() - 2)
    if layer.groups:
        rows = kept.reshape(layer.groups, 1, -1).expand(-1, weight.shape[0] // layer.groups, -1)
        kept = rows.flatten(0, 1).reshape(*weight.shape[:2], *ones)
    else:
        kept = kept.reshape(-1, 1, *ones)
    return torch.empty_like(weight, dtype=torch.bool).copy_(kept.expand(weight.shape))


def companion_masks(kept: dict[str, Tensor], of: dict[str, Layer]) -> Tensors:
    """A vector shared by several layers keeps what one of them keeps."""
    masks: Tensors = {}
    for name, layer in of.items():
        for vector in layer.companions:
            masks[vector] = masks[vector] | kept[name] if vector in masks else kept[name].clone()
    return masks
