"""Which channels can go without changing what the model computes."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import ceil, isnan

import torch
from torch import Tensor, nn

from ..channels import Channels, Layer, Sink
from ..channels.flow import EVALUATION, TRAINING

IN_TRAINING = "training goes on, and only at its end can a bias absorb a constant"
ALIVE = "not zero"
OTHERS = "where they are read another layer has added to them, gated or padded them"


@dataclass
class Choice:
    """Roots of channels that go, and for others why they stay."""

    gone: set[int]
    stay: dict[int, str] = field(default_factory=dict)

    def revive(self, roots: Iterable[int], count: int, reason: str) -> bool:
        """Keeps `count` more of the channels, the first ones."""
        dead = [root for root in dict.fromkeys(roots) if root in self.gone][:count]
        self.gone.difference_update(dead)
        self.stay.update(dict.fromkeys(dead, reason))
        return bool(dead)


def choose(channels: Channels, model: nn.Module, training: bool, multiple_of: int) -> Choice:
    """Channels that every reader can do without; with `training` also while training goes on."""
    stay: dict[int, str] = {}
    read: set[int] = set()
    for sink in channels.sinks:
        roots = channels.roots(sink.columns.labels)
        read.update(roots)
        weight = model.get_parameter(sink.columns.name)
        for root, reason in zip(roots, reasons(sink, weight, training), strict=True):
            if reason and stay.get(root, ALIVE) == ALIVE:
                stay[root] = reason
    for root in read:
        if (pinned := channels.why_pinned(root)) is not None:
            stay[root] = pinned
    choice = Choice(read - stay.keys(), stay)
    while constrain(channels, choice, multiple_of):
        pass
    return choice


def reasons(sink: Sink, weight: Tensor, training: bool) -> list[str]:
    """For each channel that a layer reads why it needs it, or an empty string."""
    evaluation, train = sink.emits[EVALUATION].tolist(), sink.emits[TRAINING].tolist()
    if training:
        return [in_training(*pair) for pair in zip(evaluation, train, strict=True)]
    read = read_columns(sink, weight).tolist()
    return [
        at_rest(value, sink) if is_read and value != 0 else ""
        for value, is_read in zip(evaluation, read, strict=True)
    ]


def at_rest(value: float, sink: Sink) -> str:
    return ALIVE if isnan(value) else sink.at_border


def in_training(evaluation: float, training: float) -> str:
    if isnan(evaluation):
        return ALIVE
    return "" if evaluation == 0 == training else IN_TRAINING


def read_columns(sink: Sink, weight: Tensor) -> Tensor:
    """Of the channels that a layer reads those with a weight other than zero."""
    groups = sink.columns.groups
    blocks: Tensor = weight.detach().unflatten(0, (groups, -1)) != 0
    return blocks.movedim(sink.columns.dim + 1, 1).flatten(2).any(2).flatten()


def constrain(channels: Channels, choice: Choice, multiple_of: int) -> bool:
    """Keeps what shapes need; True if that was anything."""
    changed = False
    for slot in channels.slots:
        roots = channels.roots(slot.labels)
        if choice.gone.issuperset(roots):
            changed |= choice.revive(roots, 1, "a layer keeps at least one channel")
    for groups in channels.balanced:
        members = [channels.roots(group) for group in groups]
        dead = [sum(root in choice.gone for root in roots) for roots in members]
        for roots, count in zip(members, dead, strict=True):
            reason = "the groups of a grouped convolution stay equally large"
            changed |= choice.revive(roots, count - min(dead), reason)
    for layer in channels.layers.values():
        missing = up_to_multiple(channels.roots(layer.labels), choice, multiple_of)
        reason = f"kept for multiple_of={multiple_of}"
        changed |= choice.revive(channels.roots(layer.labels), missing, reason)
    return changed


def up_to_multiple(roots: tuple[int, ...], choice: Choice, multiple_of: int) -> int:
    kept = sum(root not in choice.gone for root in roots)
    return min(len(roots), ceil(kept / multiple_of) * multiple_of) - kept


def why_stayed(channels: Channels, layer: Layer, choice: Choice) -> str:
    """For the layer's channels whose rows are zero, but which stay."""
    constant = ~torch.isnan(layer.emits[EVALUATION])
    counts: Counter[str] = Counter()
    for root, zero in zip(channels.roots(layer.labels), constant.tolist(), strict=True):
        if zero and root not in choice.gone:
            reason = choice.stay.get(root) or channels.why_pinned(root) or "no layer reads it"
            counts[OTHERS if reason == ALIVE else reason] += 1
    return "; ".join(f"{count} zero stay: {reason}" for reason, count in counts.items())
