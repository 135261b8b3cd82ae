"""SDprun's update: momentum SGD on an accumulator v whose groups, as weights w, shrink to zero.

    v <- v - lr * d        w_g = v_g * max(0, 1 - eta_g * G / |v_g|)

d is the gradient at w, or its momentum buffer, by the arithmetic of `torch.optim.SGD` with
`foreach=False, fused=False`: with G = 0 the weights have its bits. G only grows:

    n <- n + 1      G <- G + c * lr'^(1/2 + mu) * (n^mu - (n - 1)^mu)      lr' = lr / (1 - momentum)

so that a falling learning rate never takes back what was pruned. With `total_steps`, c is the one
that would bring G to `goal` in the steps that are left: the learning rate cancels.

A pruning group is all that makes one output channel: its index of one tensor, or of several coupled
ones. eta_g is 1, or with `scale` the square root of the number of elements.

|v_g| is the same in every implementation, to the bit, and with it the set of zeros. A tensor's part
of it: elements of the group in their order in memory, number i to lane i mod 128; each lane adds
its squares (of float64 numbers) one after the other; then lanes j and j + 64 are added, j and
j + 32, and so on down to one. The parts of coupled tensors are added in list order.
"""

from collections.abc import Iterator, Sequence
from math import sqrt
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .select import order_keys

# Columns of `settings` and of `progress`; their rows go together, one for each parameter group.
SETTINGS = (
    "lr",
    "momentum",
    "maximize",
    "c",
    "mu",
    "scale",
    "min_groups",
    "total_steps",
    "goal",
)
PROGRESS = ("num_steps", "threshold")
LANES = 128


def sdprun_threshold_(progress: Tensor, settings: Tensor, found_inf: Tensor | None = None) -> None:
    """n and G of the next step, in place; nothing changes if `found_inf` is 1."""
    column = dict(zip(SETTINGS, settings.unbind(1), strict=True))
    n, threshold = progress[:, 0] + 1, progress[:, 1]
    mu, total = column["mu"], column["total_steps"]
    # n^mu - (n - 1)^mu without cancellation; at n = 1 the logarithm is -inf and the result 1.
    growth = -(n**mu) * torch.expm1(mu * torch.log1p(-1 / n))
    rate = column["lr"] / (1 - column["momentum"])
    free = column["c"] * rate ** (0.5 + mu) * growth
    share = torch.where(n < total, growth / (total**mu - n**mu + growth), 1.0)
    left = column["goal"] - threshold
    steered = torch.where(left > 0, left * share, 0.0)
    new = torch.stack([n, threshold + torch.where(total > 0, steered, free)], 1)
    progress.copy_(new if found_inf is None else torch.where(found_inf != 0, progress, new))


def sdprun_update_(
    accumulators: Sequence[Tensor],
    momenta: Sequence[Tensor],
    weights: Sequence[Tensor],
    norms: Tensor,
    gradients: Sequence[Tensor],
    progress: Tensor,
    settings: Tensor,
    rows: Sequence[int],
    first_groups: Sequence[int],
    column_groups: Sequence[int],
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    guard: bool = False,
) -> None:
    """One step of every tensor, in place; nothing changes if `found_inf` is 1.

    `rows` says which row of `settings` and of `progress` a tensor takes. `first_groups` says where
    in `norms` its channels begin, or -1: not pruned, w = v. Neighbours in the list that begin at
    the same place are coupled. The channels are dimension 0 where `column_groups` is 0, and the
    columns (dimension 1) of that many convolution groups elsewhere, numbered group by group.

    A tensor without elements stands for what is not there: an accumulator (the weight, not pruned,
    is its own), a momentum buffer (also an empty list: none at all), a gradient (v stays).

    With `guard`, `sdprun_guard_` follows for every layer; each must be here as a whole.
    """
    if found_inf is not None and bool(found_inf):
        return
    for i, weight in enumerate(weights):
        accumulator = _master(accumulators[i], weight)
        if gradients[i].numel():
            gradient = gradients[i].to(accumulator.dtype)
            if grad_scale is not None:
                gradient = gradient * grad_scale.double().reciprocal().to(accumulator.dtype)
            _step(accumulator, momenta[i] if momenta else None, gradient, settings[rows[i]])
        if first_groups[i] < 0 and accumulator is not weight:
            weight.copy_(accumulator)
    for layer in _layers(weights, rows, first_groups, column_groups):
        own = [_master(accumulators[i], weights[i]) for i in layer.tensors]
        found = group_norms([channel_rows(v, g) for v, g in zip(own, layer.columns, strict=True)])
        norms[layer.first : layer.first + len(found)] = found
        threshold = layer.threshold(progress, settings)
        pruned = is_pruned(found, threshold)
        factor = torch.where(threshold == 0, 1.0, 1 - threshold / found)
        for i, v, groups in zip(layer.tensors, own, layer.columns, strict=True):
            scaled = v * spread(factor, v.shape, groups).to(v.dtype)
            weights[i].copy_(scaled.masked_fill(spread(pruned, v.shape, groups), 0.0))
    if guard:
        sizes = [num_channels(w.shape, c) for w, c in zip(weights, column_groups, strict=True)]
        masters = [_master(v, w) for v, w in zip(accumulators, weights, strict=True)]
        layers = rows, first_groups, column_groups, first_groups, sizes
        sdprun_guard_(weights, masters, norms, progress, settings, *layers)


def sdprun_guard_(
    weights: Sequence[Tensor],
    accumulators: Sequence[Tensor],
    norms: Tensor,
    progress: Tensor,
    settings: Tensor,
    rows: Sequence[int],
    first_groups: Sequence[int],
    column_groups: Sequence[int],
    layer_firsts: Sequence[int],
    layer_sizes: Sequence[int],
    found_inf: Tensor | None = None,
) -> None:
    """A layer that keeps fewer than `min_groups` groups keeps its largest ones, with w = v.

    Among equal norms the lowest channel wins. `layer_firsts` and `layer_sizes` say where in `norms`
    the whole layer is, of which the tensors may be a part: other processes have the other rows.
    """
    if found_inf is not None and bool(found_inf):
        return
    for layer in _layers(weights, rows, first_groups, column_groups):
        first, size = layer_firsts[layer.tensors[0]], layer_sizes[layer.tensors[0]]
        min_groups = settings[layer.row, SETTINGS.index("min_groups")]
        threshold = layer.threshold(progress, settings)
        guarded = guarded_groups(norms[first : first + size], threshold, min_groups)
        guarded = guarded[layer.first - first :][: layer.channels]
        for i, groups in zip(layer.tensors, layer.columns, strict=True):
            where = spread(guarded, weights[i].shape, groups)
            weights[i].copy_(torch.where(where, accumulators[i].to(weights[i].dtype), weights[i]))


def is_pruned(norms: Tensor, threshold: Tensor) -> Tensor:
    """A norm of NaN is not pruned, and nothing is as long as the threshold is 0."""
    return (norms <= threshold) & (threshold > 0)


def guarded_groups(norms: Tensor, threshold: Tensor, min_groups: Tensor | int) -> Tensor:
    """True for the groups of one layer that are kept for being among its largest."""
    short = (~is_pruned(norms, threshold)).sum() < min_groups
    rank = order_keys(norms).argsort(descending=True, stable=True).argsort()
    return short & (rank < min_groups)


def group_norms(matrices: Sequence[Tensor]) -> Tensor:
    """The norm of each row over all the matrices, in the order that the file's first lines fix."""
    rows = matrices[0].shape[0]
    squares = torch.zeros(rows, dtype=torch.float64, device=matrices[0].device)
    for matrix in matrices:
        lanes = matrix.new_zeros(rows, LANES, dtype=torch.float64)
        for block in matrix.double().split(LANES, 1):
            lanes = lanes + pad(block * block, (0, LANES - block.shape[1]))
        while lanes.shape[1] > 1:
            left, right = lanes.chunk(2, 1)
            lanes = left + right
        squares = squares + lanes[:, 0]
    # Not squares.sqrt(): on some processors it is off by a unit in the last place.
    return squares.new_tensor([sqrt(x) for x in squares.tolist()])


def num_channels(shape: Sequence[int], column_groups: int) -> int:
    return column_groups * shape[1] if column_groups else shape[0]


def channel_rows(tensor: Tensor, column_groups: int) -> Tensor:
    """A matrix of one row per channel, the row's elements in their order in memory."""
    if column_groups:
        tensor = tensor.unflatten(0, (column_groups, -1)).transpose(1, 2)
    else:
        tensor = tensor.unsqueeze(0)
    inner = sorted(range(2, tensor.dim()), key=tensor.stride, reverse=True)
    channels = tensor.shape[0] * tensor.shape[1]
    return tensor.permute(0, 1, *inner).reshape(channels, tensor.numel() // max(channels, 1))


def spread(values: Tensor, shape: Sequence[int], column_groups: int) -> Tensor:
    """One value per channel, to be broadcast over a tensor of this shape."""
    if not column_groups:
        return values.view(-1, *[1] * (len(shape) - 1))
    columns = values.view(column_groups, 1, shape[1])
    each = columns.expand(-1, shape[0] // column_groups, -1)
    return each.reshape(shape[0], shape[1], *[1] * (len(shape) - 2))


class Layer(NamedTuple):
    """Tensors that share channels: their numbers in the list, and what they have in common."""

    tensors: list[int]
    columns: list[int]  # the column groups of each
    row: int
    first: int  # of its groups in the norms
    channels: int
    size: int  # elements of a group

    def threshold(self, progress: Tensor, settings: Tensor) -> Tensor:
        scaled = settings[self.row, SETTINGS.index("scale")] != 0
        eta = torch.where(scaled, settings.new_tensor(sqrt(self.size)), 1.0)
        return eta * progress[self.row, 1]


def _layers(
    weights: Sequence[Tensor],
    rows: Sequence[int],
    first_groups: Sequence[int],
    column_groups: Sequence[int],
) -> Iterator[Layer]:
    """Runs of pruned tensors that begin at the same group. Those without channels have no part."""
    run: list[int] = []
    for i, weight in enumerate(weights):
        if first_groups[i] < 0 or num_channels(weight.shape, column_groups[i]) == 0:
            continue
        if run and first_groups[run[0]] != first_groups[i]:
            yield _layer(run, weights, rows, first_groups, column_groups)
            run = []
        run.append(i)
    if run:
        yield _layer(run, weights, rows, first_groups, column_groups)


def _layer(
    run: list[int],
    weights: Sequence[Tensor],
    rows: Sequence[int],
    first_groups: Sequence[int],
    column_groups: Sequence[int],
) -> Layer:
    columns = [column_groups[i] for i in run]
    channels = num_channels(weights[run[0]].shape, columns[0])
    size = sum(weights[i].numel() for i in run) // channels
    return Layer(run, columns, rows[run[0]], first_groups[run[0]], channels, size)


def _master(accumulator: Tensor, weight: Tensor) -> Tensor:
    return accumulator if accumulator.numel() else weight


def _step(weight: Tensor, momentum: Tensor | None, gradient: Tensor, settings: Tensor) -> None:
    lr, beta, maximize = settings[:3].tolist()
    step = -gradient if maximize else gradient
    if momentum is not None and momentum.numel():
        momentum.mul_(beta).add_(step)
        step = momentum
    weight.add_(step, alpha=-lr)
