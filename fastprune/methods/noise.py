"""Random pruning: what every other method has to beat."""

from typing import Unpack

import torch
from torch import nn

from ..masks import MaskSet
from .objective import Tensors
from .ranks import averaged
from .selection import Options, Sparsities, selection


def random(
    model: nn.Module,
    sparsity: Sparsities,
    *,
    generator: torch.Generator | None = None,
    across_ranks: bool = True,
    **options: Unpack[Options],
) -> MaskSet:
    """Masks that keep weights by chance; the options are those of `fp.masks_from_scores`.

    `sparsity=fp.erk(model, 0.9)` gives the usual distribution over the layers. The numbers are
    drawn on the CPU, from torch's default generator or the one given.
    """
    chosen = selection(model, None, sparsity, "value", **options)
    scores = noise(chosen.weights, generator=generator)
    return chosen.masks(averaged(scores) if across_ranks else scores)


def noise(weights: Tensors, *, generator: torch.Generator | None = None) -> Tensors:
    return {
        name: torch.rand(weight.shape, generator=generator).to(weight.device)
        for name, weight in weights.items()
    }
