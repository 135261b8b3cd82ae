"""Parameter groups by what can be pruned."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import nn

from ..channels import Channels, Layer, Slot, confirmed, trace_channels
from ..structure import prunable_parameters

RESIDUAL = ("join", "leave")


def prunable_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Two named parameter groups: weights of convolutions, linear and attention layers with
    `prune=True`; the rest (biases, norms, embeddings, position tables) with `prune=False`."""
    prunable = prunable_parameters(model)
    rest = {n: p for n, p in model.named_parameters() if p.requires_grad and n not in prunable}
    groups: list[dict[str, Any]] = [
        {"params": list(prunable.items()), "prune": True},
        {"params": list(rest.items()), "prune": False},
    ]
    return [group for group in groups if group["params"]]


def channel_groups(
    model: nn.Module,
    example_input: Any,
    *,
    coupled: bool = True,
    residual: str = "join",
) -> list[dict[str, Any]]:
    """Named parameter groups by the output channels of convolution and linear layers.

    One group for each set of channels that live and die together, with `prune=True`,
    `coupled=True`, the set's first layer as `name`, and `channel_dims`: for each parameter the
    dimension along which index j is channel j, and the number of convolution groups that the
    parameter is to be split into first (1 but for grouped transposed convolutions). A group holds
    the rows and biases of its layers and the weight and bias of a batch or instance norm right
    behind, so that a channel of zeros emits exactly zero. The last group, `prune=False`, holds the
    other trainable parameters, among them layers whose output is the model's, or whose channels go
    through operations that mix them, such as a layer norm.

    Two analyses must agree on a set, that of torch-pruning (pip install 'fastprune[surgery]') and
    our own of the exported graph, by which `fp.compact` removes channels.

    Args:
        example_input: a tensor that the model takes, or a tuple of its arguments.
        coupled: False leaves biases and norms to the last group; weights whose channels are their
            own then share one group of plain rows, without `coupled` and `channel_dims`.
        residual: channels added or multiplied together are one set ("join"), or are left to the
            last group ("leave").
    """
    if residual not in RESIDUAL:
        raise ValueError(f"residual must be 'join' or 'leave', got {residual!r}")
    channels = trace_channels(model, example_input)
    sets = confirmed(model, example_input, list(channel_sets(channels)))
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    groups: list[dict[str, Any]] = []
    plain: list[Slot] = []
    for layers in sets:
        parts = [layer.rows + layer.norm if coupled else layer.rows[:1] for layer in layers]
        slots = [slot for part in parts for slot in part]
        makers = sum(not layer.depthwise for layer in layers)
        if (makers > 1 and residual == "leave") or any(s.name not in trainable for s in slots):
            continue
        if len(slots) == 1 and not coupled and slots[0].dim == 0:
            plain += slots
            continue
        groups.append(
            {
                "params": [(slot.name, trainable[slot.name]) for slot in slots],
                "prune": True,
                "coupled": True,
                "channel_dims": [(slot.dim, slot.groups) for slot in slots],
                "name": layers[0].name,
            }
        )
    if plain:
        groups.append({"params": [(s.name, trainable[s.name]) for s in plain], "prune": True})
    taken = {name for group in groups for name, _ in group["params"]}
    rest = [(name, p) for name, p in trainable.items() if name not in taken]
    return [*groups, {"params": rest, "prune": False}] if rest else groups


def channel_sets(channels: Channels) -> Iterator[list[Layer]]:
    """Layers whose channels are the same ones, in the same order, and may all go."""
    sets: dict[tuple[int, ...], list[Layer]] = {}
    for layer in channels.layers.values():
        sets.setdefault(channels.roots(layer.labels), []).append(layer)
    owners = Counter(root for roots in sets for root in roots)
    for roots, layers in sets.items():
        pinned = any(channels.why_pinned(root) is not None for root in roots)
        if not pinned and all(owners[root] == 1 for root in roots):
            yield layers
