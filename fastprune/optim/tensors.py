"""What the optimizers ask of parameters, gradients and state."""

from typing import Any

import torch
from torch import Tensor

from ..ops.select import laid_out_like


def check_parameter(name: str, parameter: Tensor, optimizer: str) -> None:
    if parameter.is_complex():
        raise TypeError(f"{name} is complex, which {optimizer} does not support; use view_as_real")
    if not parameter.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {parameter.dtype}")


def usable(gradient: Tensor, weight: Tensor, optimizer: str) -> Tensor:
    """The gradient in the weight's layout."""
    if gradient.is_sparse:
        raise RuntimeError(
            f"{optimizer} does not support sparse gradients; make them dense (sparse=False)"
        )
    return laid_out_like(gradient, weight)


def follow_layout(state: dict[str, Any], parameter: Tensor) -> bool:
    """model.to(memory_format=...) moves the parameter alone; whether its state had to follow."""
    strays = {
        key: v for key, v in state.items() if v is not None and v.stride() != parameter.stride()
    }
    for key, value in strays.items():
        state[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
    return bool(strays)


def is_skipped_start(optimizer: torch.optim.Optimizer) -> bool:
    """A first step that AMP skips must leave no state: the next is the first one, undamped.

    The one place where the device is asked; later the kernel finds out by itself.
    """
    found_inf: Tensor | None = getattr(optimizer, "found_inf", None)
    return not optimizer.state and found_inf is not None and bool(found_inf)
