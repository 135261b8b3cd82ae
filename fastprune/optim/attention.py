"""ASWL's layers: what each one prunes, what carries its attention, and what would cancel it."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import nn

from ..ops.reference.aswl import BOTH, PLAIN, PRUNED, SCALED
from ..structure import PRUNABLE, prunable_parameters
from .half import state_dtype
from .sharded import check_not_flat, check_pool
from .tensors import check_parameter

POSITIONS = ("weight", "post_bn")
CONVOLUTIONS = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip
NORMS = (
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm,
    nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, nn.GroupNorm,
)  # fmt: skip
BIASES = {"weight": "bias", "in_proj_weight": "in_proj_bias"}
User = tuple[nn.Module, str]  # a module and the name it has for the weight


class Part(NamedTuple):
    """A trainable parameter: its layer (-1: none) and its role there."""

    name: str
    parameter: nn.Parameter
    layer: int
    role: int


def parts_of(model: nn.Module, position: str, prune_bias: bool) -> list[Part]:
    """Every trainable parameter: layer by layer, each layer's weight first, then the plain ones.

    A frozen weight makes no layer, nor does that of a depthwise convolution. What several layers
    would scale, such as a bias they share, stays plain.
    """
    for name, parameter in model.named_parameters():
        check_not_flat(name, parameter)
    trainable = {id(p): (name, p) for name, p in model.named_parameters() if p.requires_grad}
    norms = dict(_followed(model))
    claims: dict[int, list[tuple[int, int]]] = {}
    number = 0
    for weight in prunable_parameters(model).values():
        users = list(_users(model, weight))
        if id(weight) not in trainable or not weight.numel() or any(map(_is_depthwise, users)):
            continue
        behind = [norms.get(module) for module, _ in users] if position == "post_bn" else [None]
        carriers = [norm for norm in behind if norm is not None and norm.weight is not None]
        carried = len(carriers) == len(behind)
        claims[id(weight)] = [(number, PRUNED if carried else BOTH)]
        for parameter, role in _others(users, carriers if carried else [], prune_bias):
            claims.setdefault(id(parameter), []).append((number, role))
        number += 1
    parts = [
        Part(*trainable[key], *claim[0])
        for key, claim in claims.items()
        if key in trainable and len(set(claim)) == 1
    ]
    taken = {id(part.parameter) for part in parts}
    rest = [Part(*trainable[key], -1, PLAIN) for key in trainable if key not in taken]
    return parts + rest


def cancelled_layers(model: nn.Module) -> list[str]:
    """The weights whose scale a norm right behind takes out again."""
    followed = {id(module.weight) for module, _ in _followed(model)}
    return [name for name, p in prunable_parameters(model).items() if id(p) in followed]


def _users(model: nn.Module, weight: nn.Parameter) -> Iterator[User]:
    for module in model.modules():
        for kind, names in PRUNABLE.items():
            if isinstance(module, kind):
                yield from ((module, n) for n in names if getattr(module, n, None) is weight)


def _others(
    users: list[User], norms: list[Any], prune_bias: bool
) -> Iterator[tuple[nn.Parameter, int]]:
    """What belongs to a layer beside its weight, with its role."""
    for module, name in users:
        bias = getattr(module, BIASES.get(name, ""), None)
        if bias is not None and (prune_bias or not norms):
            yield bias, SCALED if not prune_bias else PRUNED if norms else BOTH
    for norm in norms:
        yield norm.weight, SCALED
        if norm.bias is not None:
            yield norm.bias, SCALED


def _is_depthwise(user: User) -> bool:
    module = user[0]
    return isinstance(module, CONVOLUTIONS) and 1 < module.groups == module.in_channels


def _followed(model: nn.Module) -> Iterator[tuple[Any, Any]]:
    """Convolution and linear layers with the norm that their parent registers right behind."""
    for parent in model.modules():
        for module, norm in pairwise(parent.children()):
            if isinstance(module, (*CONVOLUTIONS, nn.Linear)) and isinstance(norm, NORMS):
                linear = isinstance(module, nn.Linear)
                outputs = module.out_features if linear else module.out_channels
                channels = (
                    norm.num_channels if isinstance(norm, nn.GroupNorm) else norm.num_features
                )
                if outputs == channels:
                    yield module, norm


def check_parts(parts: list[Part], position: str) -> None:
    if not any(part.layer >= 0 for part in parts):
        raise ValueError(
            "model has no trainable convolution, linear or attention layer, so there is nothing "
            "to prune"
        )
    if position == "post_bn" and not any(part.role == PRUNED for part in parts):
        raise ValueError(
            "attention_position='post_bn' needs a batch, instance or group norm with a weight, "
            "registered right behind a layer in the same module, and model has none; use 'weight'"
        )
    first = parts[0]
    dtypes: dict[int, torch.dtype] = {}
    for part in parts:
        check_parameter(part.name, part.parameter, "ASWL")
        if part.parameter.device != first.parameter.device:
            raise ValueError(
                f"the model must be on one device: {first.name} is on {first.parameter.device}, "
                f"{part.name} on {part.parameter.device}"
            )
        dtype = state_dtype(part.parameter)
        if part.layer >= 0 and dtypes.setdefault(part.layer, dtype) != dtype:
            raise ValueError(
                f"{part.name} is {part.parameter.dtype}, another parameter of its layer is not: a "
                "layer must be all float64 or have none"
            )
    check_pool([(p.name, p.parameter) for p in parts if p.layer >= 0], (1, 1))
