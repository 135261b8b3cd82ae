"""Whole channels of a model: which sets of layers share them, and how some are taken out."""

import copy
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..channels import Channels, Layer, trace_channels
from ..channels.trace import checked_arguments
from ..deploy import compact
from ..deploy.surgery import cut_tensors, plan_cuts, replace_tensors
from ..optim.groups import channel_sets

Counts = Mapping[str, int]


class ChannelSets:
    """The sets of layers of a model whose channels can be removed one by one.

    Layers that are added together are one set, named after the first. Left out are the model's
    output, layers of a single channel, and what operations that mix channels or the equal groups of
    a grouped convolution hold together.
    """

    def __init__(self, model: nn.Module, example_input: Any) -> None:
        self.model = model
        self.arguments = on_device_of(model, checked_arguments(model, example_input))
        self.channels = trace_channels(model, self.arguments)
        read = {root for sink in self.channels.sinks for root in self._roots(sink.columns.labels)}
        held = self._held()
        self.layers: dict[str, list[Layer]] = {}
        for layers in channel_sets(self.channels):
            roots = self._roots(layers[0].labels)
            if len(roots) > 1 and read >= roots and not held & roots:
                self.layers[layers[0].name] = layers

    def _roots(self, labels: Iterable[int]) -> set[int]:
        return set(self.channels.roots(labels))

    def _held(self) -> set[int]:
        groups = [group for groups in self.channels.balanced for group in groups]
        return {root for group in groups for root in self._roots(group)}

    @property
    def names(self) -> dict[str, tuple[str, ...]]:
        """For each set the names of all of its layers."""
        return {name: tuple(each.name for each in layers) for name, layers in self.layers.items()}

    @property
    def sizes(self) -> dict[str, int]:
        return {name: len(layers[0].labels) for name, layers in self.layers.items()}

    def gone(self, order: Mapping[str, Sequence[int]], counts: Counts) -> set[int]:
        """Roots of all channels but the first `counts` of each set's order."""
        return {
            self.channels.root(self.layers[name][0].labels[channel])
            for name, count in counts.items()
            for channel in order[name][count:]
        }

    def cut(self, gone: set[int]) -> nn.Module:
        """A copy of the right sizes; its outputs are not compared with anything."""
        small = copy.deepcopy(self.model)
        replace_tensors(small, cut_tensors(small, plan_cuts(self.channels, gone)))
        return small

    def removed(self, order: Mapping[str, Sequence[int]], counts: Counts) -> nn.Module:
        """A copy without these channels: it computes what the model does when nobody reads them."""
        deaf = copy.deepcopy(self.model)
        ignore(deaf, self.channels, self.gone(order, counts))
        small, report = compact(deaf, self.arguments, return_report=True)
        left = {layer.name: layer for layer in report.layers}
        for name, count in counts.items():
            if left[name].after > count:
                warnings.warn(
                    f"{left[name].after} channels of {name} stay, asked were {count}: "
                    f"{left[name].stayed or 'the model needs them'}",
                    stacklevel=3,
                )
        return small


@torch.no_grad()
def ignore(model: nn.Module, channels: Channels, gone: set[int]) -> None:
    """Zeroes what readers do with channels: whatever these then emit, they can be cut out."""
    for sink in channels.sinks:
        leaving = [root in gone for root in channels.roots(sink.columns.labels)]
        if any(leaving):
            slot, weight = sink.columns, model.get_parameter(sink.columns.name)
            columns = weight.unflatten(0, (slot.groups, -1)).movedim(slot.dim + 1, 1)
            columns[torch.tensor(leaving, device=weight.device).view(slot.groups, -1)] = 0


def on_device_of(model: nn.Module, value: Any) -> Any:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, value)
