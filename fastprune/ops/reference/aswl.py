"""ASWL's step: dense weights, one attention a per layer and the sparsity it stands for, together.

The loss is taken at a * w_hat; w_hat is the dense w of a layer without its k smallest |w|:

    p = (1 - a)^alpha        k = min(floor(n * p), n - 1)

With G the gradient of what the parameter holds, in this order, all from the old a and w_hat:

    w <- SGD with momentum on a * G + 2 * l2 * w_hat    (straight through: pruned weights move too)
    a <- SGD with momentum on <G, w_hat> + push * dS/da, clamped to [FLOOR, 1]
    S = sum((1 - p) * n) / sum(n)
    push = 2 * density_weight * (S - target) + multiplier - damping

<G, w_hat> runs over what carries a: the weight and the bias, or those of the norm behind. The
penalty alone stays off its target by as much as the loss pulls at a, and swings under momentum:

* The multiplier sums up the gap, at a part of the rate at which the penalty itself closes it, so
  that it stays behind at any learning rate. It does not wind up: a gap wider than NEAR counts as
  NEAR, and where no layer can follow it stands still.
* The damping takes out of the momentum what moves S, as much as makes that motion critically
  damped. With `stiffness`, the part of a gap that the penalty closes in one step without momentum,
  that leaves a momentum of (1 - sqrt(stiffness))^2. Motions of a at the same S keep theirs.

Attention is float64 and the same in every implementation, to the bit, as long as alpha is 0.5, 1
or 2; other powers may differ in their last bit. Sums over layers run in their order.
"""

from collections.abc import Sequence
from math import sqrt

import torch
from torch import Tensor
from torch.nn.functional import pad

from .gsm import sgd_step, unscaled
from .select import _select as select_segment
from .select import element_scores, order_keys

SETTINGS = (
    "lr",
    "momentum",
    "l2",
    "attention_lr",
    "alpha",
    "target",
    "density_weight",
    "gain",
)
ATTENTION = ("attention", "momentum", "threshold")  # columns, one row a layer
PLAIN, BOTH, SCALED, PRUNED = range(4)  # roles of a tensor; BOTH: pruned and scaled
FLOOR = 0.01
NEAR = 0.02  # what the multiplier sees of a wider gap, which closes by itself
RUN, LANES = 4, 128
ALL_TIES = torch.iinfo(torch.int64).max


def aswl_step_(
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
    keep_ties: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """One step of a whole model, in place; nothing changes if `found_inf` is 1.

    Tensor i belongs to layer `layers[i]` (-1: none, and its role is PLAIN: ordinary SGD). A layer's
    tensors are neighbours and layers ascend. Its tensors of role BOTH or PRUNED are one pool, in
    list order; the first is its weight, whose size alone counts in S. SCALED ones carry a.

    `dense` holds the weights, float32 or float64, and a parameter what follows from them; that of a
    plain tensor may be empty: the parameter itself is the weight. Empty `momenta`: no momentum.
    Empty gradients: the weight stays, but its parameter follows a. An element is pruned if its |w|
    is below its layer's threshold, or equals it at a position of the pool from `tie_end` on.
    """
    if found_inf is not None and bool(found_inf):
        return
    lr, beta, l2 = settings[:3].tolist()
    weights = [d if d.numel() else p for d, p in zip(dense, parameters, strict=True)]
    starts, sizes = pool_starts(weights, layers, roles)
    pulls = attention.new_zeros(len(attention))
    for i, weight in enumerate(weights):
        if not gradients[i].numel():
            continue
        layer, role = layers[i], roles[i]
        gradient = unscaled(gradients[i], weight, grad_scale)
        kept = None
        if is_pruned(role):
            kept = kept_elements(weight, attention[layer, 2], tie_end[layer] - starts[i])
        if is_scaled(role):
            pulls[layer] += inner_product(gradient, weight, kept)
            gradient = gradient * attention[layer, 0].to(weight.dtype)
        if kept is not None and l2:
            gradient = gradient.add(weight.where(kept, 0.0), alpha=2 * l2)
        has_momentum = bool(momenta and momenta[i].numel())
        momentum = momenta[i] if has_momentum else torch.empty_like(weight)
        sgd_step(weight, momentum, gradient, None, lr, beta * has_momentum, 0, 0, 0, 0)
    attention_step(attention, multiplier, pulls, attention.new_tensor(sizes), settings)
    choose(attention, tie_end, weights, settings, layers, roles, keep_ties)
    for i, weight in enumerate(weights):
        if layers[i] >= 0:
            row = attention[layers[i]]
            end = tie_end[layers[i]] - starts[i]
            parameters[i].copy_(effective(weight, row, end, roles[i]))
        elif weight is not parameters[i]:
            parameters[i].copy_(weight)


def attention_step(
    attention: Tensor, multiplier: Tensor, pulls: Tensor, sizes: Tensor, settings: Tensor
) -> None:
    """The attention of every layer, by `pulls` <G, w_hat> and by the weights' `sizes`."""
    _, momentum, _, lr, alpha, target, density_weight, gain = settings.unbind()
    a, velocity = attention[:, 0], attention[:, 1]
    share = sizes / ordered_sum(sizes)
    density = ordered_sum((1 - power(1 - a, alpha)) * share)
    # At a = 1 the slope would be infinite for an alpha below 1, and 0 for ever for one above.
    slope = share * alpha * power((1 - a).clamp(min=FLOOR), alpha - 1)
    gap = density - target
    pull = 2 * density_weight * gap

    free = torch.where(gap > 0, a > FLOOR, a < 1)  # layers that can follow
    reach = ordered_sum(torch.where(free, slope * slope, 0.0))
    speed = ordered_sum(torch.where(free, slope * velocity, 0.0))
    stiffness = 2 * density_weight * lr * reach
    root = _root(stiffness)
    excess = (momentum - (1 - root) * (1 - root)).clamp(min=0)
    damping = torch.where(reach > 0, excess * speed / reach, 0.0)
    rate = torch.minimum(root, stiffness / (1 - momentum)).clamp(max=1)
    near = 2 * density_weight * gap.clamp(-NEAR, NEAR)
    multiplier.add_(near * (gain * rate))

    push = pull + multiplier - damping
    velocity.mul_(momentum).add_(pulls + push * slope)
    a.copy_((a - lr * velocity).clamp(FLOOR, 1))


def num_pruned(attention: Tensor, pool_sizes: Tensor, alpha: Tensor) -> Tensor:
    """k of each layer. A NaN of a training that diverged prunes nothing."""
    p = power(1 - attention[:, 0], alpha)
    count = (pool_sizes * p).floor().nan_to_num(0.0).to(torch.int64)
    return count.minimum(pool_sizes.to(torch.int64) - 1)


def choose(
    attention: Tensor,
    tie_end: Tensor,
    weights: Sequence[Tensor],
    settings: Tensor,
    layers: Sequence[int],
    roles: Sequence[int],
    keep_ties: bool,
) -> None:
    """Threshold and tie end of each layer, as its attention asks for them."""
    pools: list[list[Tensor]] = [[] for _ in range(len(attention))]
    for weight, layer, role in zip(weights, layers, roles, strict=True):
        if is_pruned(role):
            pools[layer].append(element_scores(weight, None, "magnitude").reshape(-1))
    sizes = attention.new_tensor([sum(s.numel() for s in pool) for pool in pools])
    num_kept = sizes.to(torch.int64) - num_pruned(
        attention, sizes, settings[SETTINGS.index("alpha")]
    )
    for layer, pool in enumerate(pools):
        threshold, _, end = select_segment(torch.cat(pool), num_kept[layer])
        attention[layer, 2] = threshold
        tie_end[layer] = ALL_TIES if keep_ties else end


def effective(weight: Tensor, row: Tensor, end: Tensor, role: int) -> Tensor:
    """What a parameter holds, in the type of its dense weight."""
    result = weight * row[0].to(weight.dtype) if is_scaled(role) else weight
    if is_pruned(role):
        result = result.where(kept_elements(weight, row[2], end), 0.0)
    return result


def kept_elements(weight: Tensor, threshold: Tensor, end: Tensor) -> Tensor:
    """`end` is where the kept ties end, counted from the tensor's own first element."""
    scores = element_scores(weight, None, "magnitude")
    keys, limit = order_keys(scores), order_keys(threshold.to(scores.dtype))
    position = torch.arange(weight.numel(), device=weight.device).view(weight.shape)
    return (keys > limit) | ((keys == limit) & (position < end))


def is_pruned(role: int) -> bool:
    return role in (BOTH, PRUNED)


def is_scaled(role: int) -> bool:
    return role in (BOTH, SCALED)


def pool_starts(
    tensors: Sequence[Tensor], layers: Sequence[int], roles: Sequence[int]
) -> tuple[list[int], list[float]]:
    """Where each pruned tensor begins in its layer's pool, and the size of each layer's weight."""
    starts = [0] * len(tensors)
    ends: dict[int, int] = {}
    sizes: dict[int, float] = {}
    for i, (tensor, layer, role) in enumerate(zip(tensors, layers, roles, strict=True)):
        if is_pruned(role):
            starts[i] = ends.get(layer, 0)
            ends[layer] = starts[i] + tensor.numel()
            sizes.setdefault(layer, float(tensor.numel()))
    return starts, [sizes[layer] for layer in sorted(sizes)]


def inner_product(gradient: Tensor, weight: Tensor, kept: Tensor | None) -> Tensor:
    """<gradient, weight> over what is kept; the order of the additions is part of the definition.

    Elements in their order in memory are cut into runs of RUN lines of LANES; the lines of a run
    are added one after the other, then lanes j and j + 64, j and j + 32, and so on down to one
    number a run; the runs' numbers are added likewise, all lines in one run.
    """
    products = gradient.double() * weight.double()
    if kept is not None:
        products = products.where(kept, 0.0)  # not multiplied: a NaN of a pruned weight stays out
    order = sorted(range(weight.dim()), key=weight.stride, reverse=True)
    flat = products.permute(order).reshape(-1)
    runs = _padded(flat, RUN * LANES).view(-1, RUN, LANES)
    lines = _padded(_run_sums(runs), LANES).view(1, -1, LANES)
    return _run_sums(lines)[0]


def _padded(flat: Tensor, multiple: int) -> Tensor:
    return pad(flat, (0, -flat.numel() % multiple))


def _run_sums(runs: Tensor) -> Tensor:
    lanes = runs.new_zeros(runs.shape[0], LANES)
    for line in runs.unbind(1):
        lanes = lanes + line
    while lanes.shape[1] > 1:
        left, right = lanes.chunk(2, 1)
        lanes = left + right
    return lanes[:, 0]


def ordered_sum(values: Tensor) -> Tensor:
    """Of one number per layer, in their order."""
    return values.cumsum(0)[-1] if values.numel() else values.new_zeros(())


def power(base: Tensor, exponent: Tensor) -> Tensor:
    result = torch.where(exponent == 2, base * base, base**exponent)
    result = torch.where(exponent == 0.5, _root(base), result)
    result = torch.where(exponent == -0.5, 1 / _root(base), result)
    result = torch.where(exponent == 1, base, result)
    return torch.where(exponent == 0, 1.0, result)


def _root(x: Tensor) -> Tensor:
    """Torch's is off by a unit in the last place on some CPUs; a GPU's is exact, and not read."""
    if x.is_cuda:
        return x.sqrt()
    roots = [sqrt(v) if v >= 0 else torch.nan for v in x.reshape(-1).tolist()]
    return x.new_tensor(roots).view(x.shape)
