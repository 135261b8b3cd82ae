"""The channel switch: every channel of an activation times its own factor.

    y[n, c, ...] = s[c] x[n, c, ...]
    dx[n, c, ...] = s[c] dy[n, c, ...]        ds[c] = sum of dy x over all but the channels

or with s[n, c], a factor for each channel of each example. 16-bit activations are multiplied in
float32 and rounded once.
"""

import torch
from torch import Tensor


def channel_switch(input: Tensor, scale: Tensor) -> Tensor:
    """`input` is [N, C, ...], `scale` [C] or [N, C]; the result has the layout of the input."""
    return torch.empty_like(input).copy_(_wide(input) * _spread(scale, input))


def channel_switch_backward(grad: Tensor, input: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of input and scale; products as wide as the input's, their sums in float64."""
    factors = _spread(scale, input)
    grad_input = torch.empty_like(input).copy_(_wide(grad) * factors)
    products = (_wide(grad) * _wide(input)).double()
    sums = products.sum_to_size(factors.shape).reshape(scale.shape)
    return grad_input, sums.to(scale.dtype).contiguous()


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _spread(scale: Tensor, input: Tensor) -> Tensor:
    """The scale in the input's precision, so that it broadcasts over the positions."""
    positions = (1,) * (input.dim() - 2)
    return scale.to(_wide(input[:0]).dtype).reshape(*scale.shape, *positions)
