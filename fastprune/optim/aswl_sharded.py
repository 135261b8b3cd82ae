"""ASWL's step over parameters whose rows are spread over processes (FSDP2, DTensor).

The processes exchange <G, w_hat> of all layers in one all-reduce, then select all thresholds
together as `sharded.py` does it: six messages a step for float32. The sums are added in another
order than by a single process, in float64; given the same sums, masks and counts are the same.
Attention and thresholds are the same on every process, and nothing is read back.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..ops.reference.aswl import (
    ALL_TIES,
    SETTINGS,
    attention_step,
    effective,
    inner_product,
    is_pruned,
    is_scaled,
    kept_elements,
    num_pruned,
    pool_starts,
)
from ..ops.reference.gsm import SETTINGS as SGD_SETTINGS
from ..ops.reference.gsm import unscaled
from .sharded import Shard, select_pools_sharded


def aswl_step_sharded(
    shards: Sequence[Shard],
    l2: float,
    parameters: Sequence[Tensor],
    dense: Sequence[Tensor],
    momenta: Sequence[Tensor],
    attention: Tensor,
    tie_end: Tensor,
    multiplier: Tensor,
    gradients: Sequence[Tensor],
    settings: Tensor,
    layers: Sequence[int],
    roles: Sequence[int],
    keep_ties: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """`aswl_step_` of the local rows; `shards` say where in the whole they are.

    `l2` is that of the settings, known here without asking the device.
    """
    weights = [d if d.numel() else p for d, p in zip(dense, parameters, strict=True)]
    wholes = [torch.empty(shard.shape, device="meta") for shard in shards]
    starts, sizes = pool_starts(wholes, layers, roles)
    starts = [start + shard.offset for start, shard in zip(starts, shards, strict=True)]
    group = next(shard.group for shard in shards if shard.group is not None)

    moving = [i for i, gradient in enumerate(gradients) if gradient.numel()]
    pulls = attention.new_zeros(len(attention))
    steps = []
    for i in moving:
        weight, layer = weights[i], layers[i]
        gradient = unscaled(gradients[i], weight, grad_scale)
        kept = None
        if is_pruned(roles[i]):
            kept = kept_elements(weight, attention[layer, 2], tie_end[layer] - starts[i])
        if is_scaled(roles[i]):
            # What every process holds is counted by the first one.
            if shards[i].group is not None or dist.get_rank(group) == 0:
                pulls[layer] += inner_product(gradient, weight, kept)
            gradient = gradient * attention[layer, 0].to(weight.dtype)
        if kept is not None and l2:
            gradient = gradient.add(weight.where(kept, 0.0), alpha=2 * l2)
        steps.append(gradient)
    dist.all_reduce(pulls, group=group)
    _sgd([weights[i] for i in moving], [momenta[i] for i in moving] if momenta else [], steps,
         settings, found_inf)  # fmt: skip

    new, moved = attention.clone(), multiplier.clone()
    attention_step(new, moved, pulls, attention.new_tensor(sizes), settings)
    if found_inf is not None:
        skipped = found_inf != 0
        new, moved = torch.where(skipped, attention, new), torch.where(skipped, multiplier, moved)
    attention.copy_(new)
    multiplier.copy_(moved)

    _choose(attention, tie_end, weights, settings, layers, roles, shards, starts, group)
    if keep_ties:
        tie_end.fill_(ALL_TIES)
    for i, weight in enumerate(weights):
        if layers[i] >= 0:
            end = tie_end[layers[i]] - starts[i]
            parameters[i].copy_(effective(weight, attention[layers[i]], end, roles[i]))
        elif weight is not parameters[i]:
            parameters[i].copy_(weight)


def _sgd(
    weights: list[Tensor],
    momenta: list[Tensor],
    gradients: list[Tensor],
    settings: Tensor,
    found_inf: Tensor | None,
) -> None:
    table = settings.new_zeros(1, len(SGD_SETTINGS))
    for name in ("lr", "momentum"):
        table[0, SGD_SETTINGS.index(name)] = settings[SETTINGS.index(name)]
    buffers = momenta or [weight.new_empty(0) for weight in weights]
    masks = [weight.new_empty(0, dtype=torch.uint8) for weight in weights]
    rows = [0] * len(weights)
    torch.ops.fastprune.masked_sgd_(
        weights, buffers, [], gradients, masks, table, rows, None, found_inf
    )


def _choose(
    attention: Tensor,
    tie_end: Tensor,
    weights: Sequence[Tensor],
    settings: Tensor,
    layers: Sequence[int],
    roles: Sequence[int],
    shards: Sequence[Shard],
    starts: Sequence[int],
    group: Any,
) -> None:
    """Threshold and tie end of each layer, the same on every process."""
    pool = [i for i, role in enumerate(roles) if is_pruned(role)]
    sizes = attention.new_zeros(len(attention))
    for i in pool:
        sizes[layers[i]] += shards[i].shape.numel()
    alpha = settings[SETTINGS.index("alpha")]
    threshold, end = select_pools_sharded(
        [weights[i] for i in pool],
        [],
        sizes.to(torch.int64) - num_pruned(attention, sizes, alpha),
        [starts[i] for i in pool],
        [shards[i] for i in pool],
        "magnitude",
        [layers[i] for i in pool],
    )
    dist.all_reduce(end, dist.ReduceOp.MIN, group=group)  # the first tie that is dropped anywhere
    attention[:, 2] = threshold
    tie_end.copy_(end.minimum(sizes.to(torch.int64)))
