"""How many channels to keep: the least important go first, until the model fits a budget."""

import copy
from collections.abc import Callable, Mapping, Sequence
from math import ceil, log2
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from ..channels.rules import LAYERS, TRANSPOSED
from ..channels.trace import evaluating
from ..deploy.surgery import cut_tensors, plan_cuts
from ..progress import Progress
from .ranks import is_first
from .removal import ChannelSets, Counts

KINDS = ("flops", "parameters", "milliseconds")
# A candidate runs at least so often, and more while that takes less than these seconds.
LEAST_PASSES, MOST_PASSES, SECONDS = 7, 101, 0.3


class Greedy:
    """Channels of all layers in the order in which they go: the smallest share first.

    A share is the mean of a switch times the number of its layer's channels, so 1 is the average.
    The first channel of each layer never goes.
    """

    def __init__(self, shares: Mapping[str, Sequence[float]]) -> None:
        """`shares` are sorted, the largest first."""
        self._sizes = {name: len(values) for name, values in shares.items()}
        channels = [
            (share, -rank, position, name)
            for position, (name, values) in enumerate(shares.items())
            for rank, share in enumerate(values)
            if rank
        ]
        self._order = [name for *_, name in sorted(channels)]

    def __len__(self) -> int:
        return len(self._order)

    def counts(self, num_removed: int) -> dict[str, int]:
        """What is kept of each layer."""
        counts = dict(self._sizes)
        for name in self._order[:num_removed]:
            counts[name] -= 1
        return counts

    def within(self, cost: Callable[[Counts], float], budget: float, kind: str) -> dict[str, int]:
        """The counts with the fewest channels gone whose cost fits, if each that goes lowers it."""
        if cost(self.counts(0)) <= budget:
            return self.counts(0)
        if (least := cost(self.counts(len(self)))) > budget:
            raise ValueError(
                f"{kind} of at most {budget:,.6g} cannot be reached: {least:,.6g} are left with "
                "one channel in each ranked layer; allow more"
            )
        too_few, enough = 0, len(self)
        while enough - too_few > 1:
            middle = (too_few + enough) // 2
            if cost(self.counts(middle)) <= budget:
                enough = middle
            else:
                too_few = middle
        return self.counts(enough)


def within_budget(
    greedy: Greedy,
    sets: ChannelSets,
    order: Mapping[str, Sequence[int]],
    kind: str,
    budget: float,
    progress: bool,
) -> dict[str, int]:
    """Shares of the whole model's parameters or flops if `budget` is at most 1."""
    if kind == "milliseconds":
        most = 2 + ceil(log2(max(len(greedy), 2)))
        with Progress("timing candidates", most, shown=progress and is_first()) as bar:

            def time(counts: Counts) -> float:
                taken = milliseconds(sets.cut(sets.gone(order, counts)), sets.arguments)
                bar.advance(f"{sum(counts.values())} channels, {taken:.3g} ms")
                return taken

            return greedy.within(time, budget, kind)
    sizes = Sizes(sets)
    weights = positions(sets) if kind == "flops" else None

    def count(counts: Counts) -> float:
        return sizes.cost(sets.gone(order, counts), weights)

    return greedy.within(
        count, budget * sizes.cost(set(), weights) if budget <= 1 else budget, kind
    )


class Sizes:
    """Parameters of a model with some of its channels gone, by cutting tensors without data."""

    def __init__(self, sets: ChannelSets) -> None:
        self._channels = sets.channels
        self._model = copy.deepcopy(sets.model).to("meta")
        self._whole = {name: p.numel() for name, p in self._model.named_parameters()}

    def cost(self, gone: set[int], positions: Mapping[str, int] | None) -> int:
        """All parameters; or flops, two for each product of a weight with one of its positions."""
        cut = cut_tensors(self._model, plan_cuts(self._channels, gone))
        left = self._whole | {name: cut[name].numel() for name in cut.keys() & self._whole.keys()}
        if positions is None:
            return sum(left.values())
        return 2 * sum(left[name] * count for name, count in positions.items())


def positions(sets: ChannelSets) -> dict[str, int]:
    """How often the weight of each convolution or linear layer is applied to the example."""
    names = {id(p): name for name, p in sets.model.named_parameters()}
    own = set(sets.model.modules())
    counts: dict[str, int] = {}

    def look(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        if module not in own or not isinstance(module, LAYERS):
            return
        if isinstance(module, nn.Linear):
            count = output.numel() // module.out_features
        elif isinstance(module, TRANSPOSED):
            count = arguments[0].numel() // module.in_channels
        else:
            count = output.numel() // module.out_channels
        name = names[id(module.weight)]
        counts[name] = counts.get(name, 0) + count

    handle = register_module_forward_hook(look)  # of all modules: none of the model's is touched
    try:
        with evaluating(sets.model), torch.no_grad():
            sets.model(*sets.arguments)
    finally:
        handle.remove()
    return counts


@torch.no_grad()
def milliseconds(model: nn.Module, arguments: tuple[Any, ...]) -> float:
    """The median time of a pass in evaluation."""
    with evaluating(model):
        for _ in range(2):
            seconds(model, arguments)
        times: list[float] = []
        while len(times) < LEAST_PASSES or (sum(times) < SECONDS and len(times) < MOST_PASSES):
            times.append(seconds(model, arguments))
    return 1e3 * median(times)


def seconds(model: nn.Module, arguments: tuple[Any, ...]) -> float:
    devices = [a.device for a in arguments if isinstance(a, Tensor) and a.device.type != "cpu"]
    for device in devices:
        torch.get_device_module(device).synchronize(device)
    start = perf_counter()
    model(*arguments)
    for device in devices:
        torch.get_device_module(device).synchronize(device)
    return perf_counter() - start
