"""GSM's update (Ding et al. 2019, eq. 6-8): momentum SGD whose loss gradient is gated.

    z <- momentum * z + (1 - dampening) * (weight_decay * w + B * g)        w <- w - lr * z

B is 1 for the Q largest |w * g| of the pool, 0 for the passive rest, whose weights only decay.
Nothing is masked: neither weights nor momenta. The arithmetic is that of `torch.optim.SGD` with
`foreach=False, fused=False`, one fused multiply-add where torch has one, so that a pool that is
all active gives its bits.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .select import element_scores, order_keys, select_threshold

# Columns of `settings`, one row for each set of hyper-parameters.
SETTINGS = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")


def gsm_update_(
    weights: Sequence[Tensor],
    momenta: Sequence[Tensor],
    copies: Sequence[Tensor],
    gradients: Sequence[Tensor],
    gates: Sequence[Tensor],
    threshold: Tensor,
    tie_end: Tensor,
    positions: Sequence[int],
    settings: Tensor,
    rows: Sequence[int],
    block: Sequence[int],
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """One step of every tensor, in place; nothing changes if `found_inf` is 1.

    A tensor at position -1 is outside the pool: plain momentum SGD. Others start at that position
    of the pool; an element is active if its score is above `threshold`, or equals it and lies
    before `tie_end`. `gates`, where given, hold that choice instead, one bool per `block` of
    (outputs, inputs) as `block_scores` shapes them, and then the threshold is not looked at.
    `copies`, where given, hold the 16-bit parameters whose float32 masters the weights are (an
    empty tensor: no copy). `rows` says which row of `settings` (columns: SETTINGS) a tensor takes.
    """
    if found_inf is not None and bool(found_inf):
        return
    for i, (weight, momentum, gradient) in enumerate(zip(weights, momenta, gradients, strict=True)):
        hyper = settings[rows[i]].tolist()
        active = None
        if positions[i] >= 0:
            active = (
                _expanded(gates[i], weight.shape, block)
                if gates
                else _active(weight, gradient, threshold, tie_end - positions[i])
            )
        gradient = gradient.to(weight.dtype)
        if grad_scale is not None:
            gradient = gradient * grad_scale.double().reciprocal().to(weight.dtype)
        _step(weight, momentum, gradient, active, *hyper)
        if copies and copies[i].numel():
            copies[i].copy_(weight)


def gsm_step_(
    weights: Sequence[Tensor],
    momenta: Sequence[Tensor],
    copies: Sequence[Tensor],
    gradients: Sequence[Tensor],
    num_kept: Tensor,
    positions: Sequence[int],
    settings: Tensor,
    rows: Sequence[int],
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """The update of the `num_kept` largest |w * g| of a pool that lies in one place.

    `select_threshold` and `gsm_update_` in one call: the tensors with a position are the pool, in
    the order of their positions, which start at 0 and leave no gap.
    """
    pool = [i for i, position in enumerate(positions) if position >= 0]
    threshold, _, tie_end, _ = select_threshold(
        [weights[i] for i in pool], [gradients[i] for i in pool], num_kept, "saliency"
    )
    choice = (threshold, tie_end, positions, settings, rows, (1, 1), grad_scale, found_inf)
    gsm_update_(weights, momenta, copies, gradients, [], *choice)


def _step(
    weight: Tensor,
    momentum: Tensor,
    gradient: Tensor,
    active: Tensor | None,
    lr: float,
    beta: float,
    dampening: float,
    weight_decay: float,
    nesterov: float,
    maximize: float,
) -> None:
    step = -gradient if maximize else gradient
    if active is not None:
        step = step.where(active, 0.0)  # selected, not multiplied: a NaN does not leak from B = 0
    if weight_decay:
        step = step.add(weight, alpha=weight_decay)
    if beta:
        momentum.mul_(beta).add_(step, alpha=1 - dampening)
    else:
        momentum.copy_(step)
    weight.add_(step.add(momentum, alpha=beta) if nesterov else momentum, alpha=-lr)


def _active(weight: Tensor, gradient: Tensor, threshold: Tensor, tie_end: Tensor) -> Tensor:
    keys = order_keys(element_scores(weight, gradient, "saliency"))
    limit = order_keys(threshold)
    position = torch.arange(weight.numel(), device=weight.device).view(weight.shape)
    return (keys > limit) | ((keys == limit) & (position < tie_end))


def _expanded(gate: Tensor, shape: torch.Size, block: Sequence[int]) -> Tensor:
    """One bool per block repeated over the elements of the block."""
    rows = gate.repeat_interleave(block[0], 0)[: shape[0]]
    return rows.repeat_interleave(block[1], 1)[:, : shape[1]]
