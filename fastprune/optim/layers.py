"""Pruning groups by layer: which tensors share channels, and where the norms of a layer stand."""

from collections.abc import Sequence
from math import sqrt
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..masks import Sparsity, num_kept
from ..ops.reference.sdprun import channel_rows, group_norms, num_channels, spread
from .sharded import Shard, local, shard_of


class Layer(NamedTuple):
    """Parameters whose channels are pruned together: one, or several coupled ones."""

    names: list[str]
    parameters: list[Tensor]
    columns: list[int]  # 0: the channels are dimension 0; else dimension 1, of so many conv groups
    group: int  # the number of their parameter group
    first: int  # of the layer's channels, in the norms of all layers
    channels: int  # over all processes
    size: int  # elements of a channel
    shard: Shard

    @property
    def own(self) -> slice:
        """The channels that lie in this process, in the norms of all layers."""
        first = self.first + self.shard.first_row
        return slice(first, first + num_channels(local(self.parameters[0]).shape, self.columns[0]))

    @property
    def whole(self) -> slice:
        return slice(self.first, self.first + self.channels)

    def norms(self, tensors: Sequence[Tensor]) -> Tensor:
        """Those of the local channels; one tensor for each parameter."""
        pairs = zip(tensors, self.columns, strict=True)
        return group_norms([channel_rows(tensor, columns) for tensor, columns in pairs])

    def spread(self, values: Tensor) -> list[Tensor]:
        """One value per local channel, to be broadcast over each local tensor."""
        pairs = zip(self.parameters, self.columns, strict=True)
        return [spread(values, local(p).shape, columns) for p, columns in pairs]


def layers_of(group: dict[str, Any], number: int, first: int) -> list[Layer]:
    """The layers of one parameter group, whose channels begin at `first`."""
    parameters = group["params"]
    names = group.get("param_names") or [f"{number}.{i}" for i in range(len(parameters))]
    columns = _columns(group, names)
    if group["coupled"]:
        runs = [list(range(len(parameters)))]
    else:
        runs = [[i] for i, p in enumerate(parameters) if is_pruned(group, p)]
    layers = []
    for run in runs:
        layer = _layer(
            [names[i] for i in run],
            [parameters[i] for i in run],
            [columns[i] for i in run],
            number,
            first,
        )
        layers.append(layer)
        first += layer.channels
    return layers


def is_pruned(group: dict[str, Any], parameter: Tensor) -> bool:
    prune = group["prune"]
    return parameter.dim() >= 2 if prune is None else bool(prune)


def _columns(group: dict[str, Any], names: list[str]) -> list[int]:
    dims = group["channel_dims"]
    if dims is None:
        return [0] * len(names)
    if len(dims) != len(names):
        raise ValueError(
            f"channel_dims must have one (dimension, conv groups) per parameter, got {len(dims)} "
            f"for {len(names)}"
        )
    columns = []
    for name, parameter, (dim, conv_groups) in zip(names, group["params"], dims, strict=True):
        divides = parameter.dim() > 1 and conv_groups > 0 and parameter.shape[0] % conv_groups == 0
        if dim not in (0, 1) or (dim == 1 and not divides):
            raise ValueError(
                f"the channel_dims of {name} must be (0, 1), or (1, groups) for a transposed "
                f"convolution whose groups divide {parameter.shape[:1]}, got {(dim, conv_groups)}"
            )
        columns.append(conv_groups if dim == 1 else 0)
    return columns


def _layer(
    names: list[str], parameters: list[Tensor], columns: list[int], group: int, first: int
) -> Layer:
    for name, parameter in zip(names, parameters, strict=True):
        if parameter.dim() == 0:
            raise ValueError(
                f"{name} is a single number and has no channels; put it into a group with "
                "prune=False"
            )
    counts = [num_channels(p.shape, c) for p, c in zip(parameters, columns, strict=True)]
    if len(set(counts)) > 1:
        raise ValueError(
            f"coupled parameters must have equally many channels, got "
            f"{dict(zip(names, counts, strict=True))}"
        )
    shards = [shard_of(p, name) for p, name in zip(parameters, names, strict=True)]
    split = any(shard.group is not None for shard in shards)
    if split and any(columns):
        raise ValueError(
            f"{names[0]} is sharded along dimension 0, but its channels are dimension 1, so each "
            "is cut; keep transposed convolutions out of fully_shard or use prune=False"
        )
    if len({(shard.first_row, shard.group is None) for shard in shards}) > 1:
        raise ValueError(f"coupled parameters must be sharded alike, {', '.join(names)} are not")
    size = sum(p.numel() for p in parameters) // max(1, counts[0])
    return Layer(names, parameters, columns, group, first, counts[0], size, shards[0])


def check_one_mesh(layers: Sequence[Layer]) -> None:
    """Norms are exchanged once for all layers; same answer, or error, on every process."""
    split = [layer for layer in layers if layer.shard.group is not None]
    ranks = [dist.get_process_group_ranks(layer.shard.group) for layer in split]
    for layer, other in zip(split, ranks, strict=True):
        if other != ranks[0]:
            raise ValueError(
                f"{layer.names[0]} is sharded over ranks {other} but {split[0].names[0]} over "
                f"{ranks[0]}; shard all pruned parameters over one mesh, or use two optimizers"
            )


class Pool:
    """All pruning groups together, for a threshold that leaves a wanted fraction of zeros."""

    def __init__(
        self,
        layers: Sequence[Layer],
        groups: Sequence[dict[str, Any]],
        sparsity: Sparsity,
        device: torch.device,
    ) -> None:
        sizes = [layer.size for layer in layers]
        scaled = [groups[layer.group]["scale"] == "sqrt" for layer in layers]
        etas = [sqrt(size) if scale else 1.0 for size, scale in zip(sizes, scaled, strict=True)]
        channels = torch.tensor([layer.channels for layer in layers])
        self._sizes = torch.tensor(sizes).repeat_interleave(channels).to(device)
        self._etas = torch.tensor(etas, dtype=torch.float64).repeat_interleave(channels).to(device)
        total = sum(layer.size * layer.channels for layer in layers)
        self._num_pruned = total - num_kept(sparsity, total)

    def goal(self, norms: Tensor) -> Tensor:
        """Half way between the norms of the last group to prune and of the first to keep."""
        ranked = (norms / self._etas).sort()
        covered = self._sizes[ranked.indices].cumsum(0) <= self._num_pruned
        count = covered.sum()
        last = ranked.values[(count - 1).clamp(min=0)]
        following = ranked.values[count.clamp(max=len(norms) - 1)]
        return torch.where(count > 0, (last + following) / 2, 0.0)


def exchanged(layers: Sequence[Layer], device: torch.device) -> tuple[Any, Tensor | None]:
    """The processes that share the rows, and which norms this one gives: None if none do."""
    group = next((layer.shard.group for layer in layers if layer.shard.group is not None), None)
    if group is None:
        return None, None
    counted = torch.zeros(sum(layer.channels for layer in layers), dtype=torch.bool)
    for layer in layers:
        # What every process holds is given by the first one.
        counted[layer.own] = layer.shard.group is not None or dist.get_rank(group) == 0
    return group, counted.to(device)


def gathered(norms: Tensor, group: Any, counted: Tensor | None) -> Tensor:
    """The norms of all channels of all processes, which know those of their own rows."""
    if counted is None:
        return norms
    whole = torch.where(counted, norms, 0.0)
    dist.all_reduce(whole, group=group)
    return whole
