"""Parameters of 16 bits, whose optimizer state is float32."""

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

HALF = (torch.bfloat16, torch.float16)


def state_dtype(parameter: Tensor) -> torch.dtype:
    return torch.float32 if parameter.dtype in HALF else parameter.dtype


def restore_float32(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """torch casts loaded state to the parameter's type; ours is wider for 16-bit ones."""
    saved_ids = (i for group in state_dict["param_groups"] for i in group["params"])
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    for saved_id, parameter in zip(saved_ids, parameters, strict=True):
        saved = state_dict["state"].get(saved_id)
        if saved is None or parameter.dtype not in HALF:
            continue
        for key, value in saved.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                wide = torch.empty_like(parameter, dtype=torch.float32)
                optimizer.state[parameter][key] = wide.copy_(value)
