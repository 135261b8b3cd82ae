"""The channel switch with its arguments checked."""

import torch
from torch import Tensor

ACTIVATIONS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SCALES = (torch.float32, torch.float64)


def channel_switch(input: Tensor, scale: Tensor) -> Tensor:
    """Every channel of `input` times its own factor, in one pass; differentiable in both.

    The backward pass is one too: it multiplies the gradient and sums by channel on the way.

    Args:
        input: [N, C] or [N, C, ...] in any memory format; float32, float64, bfloat16 or float16.
        scale: [C], or [N, C] for factors of each example; float32 or float64.
    """
    for name, tensor, dtypes in (("input", input, ACTIVATIONS), ("scale", scale, SCALES)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dtype not in dtypes:
            allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise TypeError(f"{name} must be {allowed}, got {tensor.dtype}")
    if input.dim() < 2:
        raise ValueError(f"input must be [N, C] or [N, C, ...], got shape {tuple(input.shape)}")
    if scale.shape not in (input.shape[1:2], input.shape[:2]):
        raise ValueError(
            f"scale must be [C] or [N, C] for input {tuple(input.shape)}, got {tuple(scale.shape)}"
        )
    if scale.device != input.device:
        raise ValueError(f"scale must be on {input.device} as the input, got {scale.device}")
    return torch.ops.fastprune.channel_switch(input, scale)  # type: ignore[no-any-return]
