"""Any optimizer of torch, made to keep a pruned network pruned."""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..masks import MaskSet, unknown_name
from .sharded import check_not_flat, is_sharded, local

AnyOptimizer = TypeVar("AnyOptimizer", bound=Optimizer)
Group = dict[str, Any]
WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def masked(optimizer: AnyOptimizer, masks: MaskSet) -> AnyOptimizer:
    """The optimizer itself, which from now on leaves true zeros where a mask is False.

    Weights and all state of a weight's shape (momenta, averages, master copies) are zeroed now,
    after each `step()` and after `load_state_dict()`, by torch's own hooks. That is a pass over
    them more, and masks as wide as the weights; `MaskedSGD` has one bit a weight in its step. Which
    mask is whose is found out as there. A deepcopy or a pickle has no hooks: call `masked` on it
    again.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}; make it "
            "first, e.g. masked(torch.optim.AdamW(model.parameters()), masks)"
        )
    found = masks_by_parameter(optimizer.param_groups, masks)
    hook = partial(_write_zeros, masks={p: BitMask(mask) for p, mask in found.items()})
    hook(optimizer)
    optimizer.register_step_post_hook(hook)
    optimizer.register_load_state_dict_post_hook(hook)
    return optimizer


class BitMask:
    """A mask as wide as what it is applied to.

    An and with it writes +0.0 over anything, NaN too, at the speed of memory: with bools torch
    takes many times as long.
    """

    def __init__(self, kept: Tensor) -> None:
        self._kept = local(kept)
        self._words: dict[torch.dtype, Tensor] = {}

    def apply(self, tensor: Tensor) -> None:
        word = WORDS[tensor.itemsize]
        if word not in self._words:
            self._words[word] = self._kept.to(word).neg_()  # of one: every bit
        local(tensor.detach()).view(word).bitwise_and_(self._words[word])

    def write_zeros(self, parameter: Tensor, state: Mapping[str, Any]) -> None:
        """Into the parameter and into what of its state has its shape."""
        for key, value in (("", parameter), *state.items()):
            like_parameter = isinstance(value, Tensor) and value.shape == parameter.shape
            if like_parameter and value.is_floating_point() and key != "step":
                self.apply(value)


@torch.no_grad()
def _write_zeros(optimizer: Optimizer, *_: Any, masks: Mapping[Tensor, BitMask]) -> None:
    for parameter, mask in masks.items():
        mask.write_zeros(parameter, optimizer.state.get(parameter, {}))


def masks_by_parameter(groups: Sequence[Group], masks: MaskSet) -> dict[Tensor, Tensor]:
    """Parameter -> its mask, laid out and sharded like the parameter.

    A mask belongs to the parameter that it was made for, if the mask set knows it; else to the
    one of its name, if the optimizer was given names; else to the only one of its shape.
    """
    if not isinstance(masks, MaskSet):
        raise TypeError(
            f"masks must be a MaskSet, got {type(masks).__name__}; fp.MaskSet(mapping) makes one "
            "of a mapping of parameter name to bool tensor"
        )
    parameters = [p for group in groups for p in group["params"]]
    names = [name for group in groups for name in group.get("param_names", ())]
    for i, parameter in enumerate(parameters):
        check_not_flat(names[i] if names else f"params[{i}]", parameter)
    by_name = dict(zip(names, parameters, strict=bool(names)))
    here = {id(p) for p in parameters}
    known = {name: p for name, p in masks.parameters.items() if id(p) in here}
    found: dict[Tensor, Tensor] = {}
    for name, mask in masks.items():
        parameter = known[name] if name in known else _lookup(name, masks, parameters, by_name)
        placed = _placed(name, mask, parameter)
        if parameter in found and not torch.equal(local(found[parameter]), local(placed)):
            raise ValueError(
                f"{name} and another mask belong to one tied parameter, but differ; keep one"
            )
        found[parameter] = placed
    return found


def _lookup(
    name: str, masks: MaskSet, parameters: list[Tensor], by_name: Mapping[str, Tensor]
) -> Tensor:
    if by_name:
        if name not in by_name:
            raise ValueError(unknown_name(name, list(by_name)))
        return by_name[name]
    shape = masks[name].shape
    alike = [p for p in parameters if p.shape == shape]
    if len(alike) == 1 and _count(masks.values(), shape) == 1:
        return alike[0]
    raise ValueError(
        f"which parameter the mask of {name!r} belongs to is not known: {len(alike)} of the "
        f"optimizer's and {_count(masks.values(), shape)} masks have its shape {tuple(shape)}; "
        "give the optimizer all of model.named_parameters(), which have names, instead of "
        "model.parameters()"
    )


def _count(tensors: Iterable[Tensor], shape: torch.Size) -> int:
    return sum(t.shape == shape for t in tensors)


def _placed(name: str, mask: Tensor, parameter: Tensor) -> Tensor:
    if mask.shape != parameter.shape:
        raise ValueError(
            f"the mask of {name} must have the shape of its parameter, {tuple(parameter.shape)}, "
            f"got {tuple(mask.shape)}"
        )
    if parameter.is_complex():
        raise TypeError(f"{name} is complex and cannot be masked; use torch.view_as_real")
    mask = mask.to(parameter.device)
    if is_sharded(parameter):
        from torch.distributed.tensor import distribute_tensor

        place = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
        mask = distribute_tensor(mask, *place, src_data_rank=None)  # each process has all of it
    return torch.empty_like(parameter, dtype=torch.bool).copy_(mask)
