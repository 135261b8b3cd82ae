"""Parameter groups by what can be pruned."""

from typing import Any

from torch import nn

from ..structure import prunable_parameters


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
