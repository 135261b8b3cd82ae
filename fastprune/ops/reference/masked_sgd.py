"""Momentum SGD of a pruned network: the mask is part of the step.

    z <- m * (momentum * z + (1 - dampening) * (g + weight_decay * w))        w <- m * (w - lr * z)

m is 1 where a weight is kept and 0 where it is pruned. What is pruned is written as +0.0, never
multiplied: whatever gradient, weight and momentum held there, NaN included, is gone after a step.
Kept elements have the arithmetic of `torch.optim.SGD(foreach=False, fused=False)`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .gsm import SETTINGS, sgd_step, unscaled

BITS = (1, 2, 4, 8, 16, 32, 64, 128)
WITHOUT_BUFFER = ("momentum", "nesterov")


def masked_sgd_(
    weights: Sequence[Tensor],
    momenta: Sequence[Tensor],
    copies: Sequence[Tensor],
    gradients: Sequence[Tensor],
    masks: Sequence[Tensor],
    settings: Tensor,
    rows: Sequence[int],
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """One step of every tensor, in place; nothing changes if `found_inf` is 1.

    `masks` are those of `packed`, one bit per element in the order of memory; an empty tensor: all
    is kept. An empty tensor among the `momenta`: no buffer, and a momentum of 0. `copies`, where
    given, hold the 16-bit parameters whose float32 masters the weights are (an empty tensor: no
    copy). `rows` says which row of `settings` (columns: gsm.SETTINGS) a tensor takes.
    """
    if found_inf is not None and bool(found_inf):
        return
    for i, weight in enumerate(weights):
        hyper = dict(zip(SETTINGS, settings[rows[i]].tolist(), strict=True))
        momentum = momenta[i]
        if not momentum.numel():
            momentum = torch.empty_like(weight)
            hyper |= dict.fromkeys(WITHOUT_BUFFER, 0.0)
        gradient = unscaled(gradients[i], weight, grad_scale)
        sgd_step(weight, momentum, gradient, None, *hyper.values())
        if masks[i].numel():
            pruned = ~unpacked(masks[i], weight)
            weight.masked_fill_(pruned, 0.0)
            momentum.masked_fill_(pruned, 0.0)
        if copies and copies[i].numel():
            copies[i].copy_(weight)


def packed(mask: Tensor) -> Tensor:
    """Bit i % 8 of byte i // 8 is element i in the order of memory; the last bits may be unused."""
    flat = mask.permute(_memory_order(mask)).reshape(-1)
    bytes_ = flat.new_zeros(-(-flat.numel() // 8), 8)
    bytes_.view(-1)[: flat.numel()] = flat
    values = torch.tensor(BITS, dtype=torch.uint8, device=mask.device)
    return (bytes_ * values).sum(1, dtype=torch.uint8)


def unpacked(bits: Tensor, weight: Tensor) -> Tensor:
    """The mask in the shape and layout of the weight that it was packed for."""
    values = torch.tensor(BITS, dtype=torch.uint8, device=bits.device)
    flat = (bits.unsqueeze(1) & values).ne(0).view(-1)[: weight.numel()]
    order = _memory_order(weight)
    mask = torch.empty_like(weight, dtype=torch.bool)
    mask.permute(order).copy_(flat.view([weight.shape[d] for d in order]))
    return mask


def _memory_order(tensor: Tensor) -> list[int]:
    """Dimensions from the outermost in memory to the innermost."""
    return sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
