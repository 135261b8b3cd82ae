"""Lottery tickets: a pruned network that starts again from its first weights."""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .masks import MaskSet


def rewind(model: nn.Module, initial_state: Mapping[str, Tensor], masks: MaskSet) -> None:
    """Loads the weights the model had before training and zeroes the pruned ones, in place.

    `initial_state` is a copy of `model.state_dict()` made before training, by `copy.deepcopy`.
    Everything is checked before the first write. Train on with a new optimizer, and with
    `mask_gradients(model, masks)` so that the zeros stay.
    """
    if not isinstance(masks, MaskSet):
        raise TypeError(f"masks must be a MaskSet, got {type(masks).__name__}")
    _check_state(model, initial_state)
    masks._checked_pairs(model)
    model.load_state_dict(initial_state)
    masks.apply(model)


def mask_gradients(model: nn.Module, masks: MaskSet) -> list[RemovableHandle]:
    """From now on gradients of pruned weights are zero; `handle.remove()` ends it for one weight.

    A weight of zero, without gradient and in a new optimizer, stays exactly zero through momentum
    and weight decay: call this after `rewind` or `masks.apply`.
    """
    if not isinstance(masks, MaskSet):
        raise TypeError(f"masks must be a MaskSet, got {type(masks).__name__}")
    return [
        parameter.register_post_accumulate_grad_hook(partial(_zero_gradient, dropped=~mask))
        for parameter, mask in masks._checked_pairs(model)
    ]


@torch.no_grad()
def _zero_gradient(parameter: Tensor, dropped: Tensor) -> None:
    if parameter.grad is not None:
        parameter.grad.masked_fill_(dropped, 0.0)


def _check_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    if not isinstance(state, Mapping):
        raise TypeError(f"initial_state must be a state_dict, got {type(state).__name__}")
    own = model.state_dict()
    for what, names in (("lacks", own.keys() - state.keys()), ("has", state.keys() - own.keys())):
        if names:
            raise ValueError(
                f"initial_state must have the names of model.state_dict(); it {what} "
                f"{', '.join(map(repr, sorted(names)[:5]))}"
            )
    for name, value in own.items():
        initial = state[name]
        if not isinstance(value, Tensor):
            continue
        if not isinstance(initial, Tensor):
            raise TypeError(f"initial_state[{name!r}] must be a tensor, got {type(initial)}")
        if initial.shape != value.shape:
            raise ValueError(
                f"initial_state[{name!r}] must have shape {tuple(value.shape)}, got "
                f"{tuple(initial.shape)}"
            )
        if value.numel() and initial.data_ptr() == value.data_ptr():
            raise ValueError(
                f"initial_state[{name!r}] is the model's own memory, so it holds the trained "
                "values; take copy.deepcopy(model.state_dict()) before training"
            )
