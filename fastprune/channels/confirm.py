"""A second opinion on which layers share their channels: the dependency graph of torch-pruning.

It follows the autograd graph, ours the exported one. It takes every operation it does not know for
elementwise and has no notion of constants, so it cannot tell what may be removed; but an error of
either analysis shows as a difference.
"""

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .flow import Layer
from .rules import LAYERS
from .trace import checked_arguments


def confirmed(
    model: nn.Module, example_input: Any, sets: Sequence[Sequence[Layer]]
) -> list[Sequence[Layer]]:
    """Those of the sets that torch-pruning finds too; what is left out is said."""
    names = [frozenset(layer.name for layer in layers) for layers in sets]
    try:
        theirs = coupled_layers(model, example_input, frozenset().union(*names))
    except ImportError as error:
        raise ImportError(
            "channel_groups needs torch-pruning: pip install 'fastprune[surgery]'"
        ) from error
    except Exception as error:
        warnings.warn(
            f"torch-pruning cannot follow {type(model).__name__} ({error!r}); its groups of "
            "channels come from the exported graph alone",
            stacklevel=3,
        )
        return list(sets)
    for doubtful in set(names) - theirs:
        warnings.warn(
            f"the channels of {', '.join(sorted(doubtful))} are not pruned: torch-pruning couples "
            "other layers with them",
            stacklevel=3,
        )
    return [layers for layers, each in zip(sets, names, strict=True) if each in theirs]


def coupled_layers(
    model: nn.Module, example_input: Any, pruned: frozenset[str]
) -> set[frozenset[str]]:
    """The names of the layers in each of torch-pruning's groups, but for layers not in `pruned`."""
    from torch_pruning import DependencyGraph

    model = copy.deepcopy(model).eval().requires_grad_(True)
    names = {module: name for name, module in model.named_modules()}
    arguments = checked_arguments(model, example_input)
    with torch.enable_grad():  # it follows the autograd graph, whoever calls
        graph = DependencyGraph().build_dependency(model, arguments, verbose=False)
    ignored = [m for m, name in names.items() if isinstance(m, LAYERS) and name not in pruned]
    groups = graph.get_all_groups(ignored_layers=ignored)
    return {
        frozenset(
            names[item.dep.target.module]
            for item in group
            if isinstance(item.dep.target.module, LAYERS)
            and graph.is_out_channel_pruning_fn(item.dep.handler)
        )
        for group in groups
    }
