"""Checks of what a mask's worth comes from: which weights, or only how many in each layer?

Train with the masks, with shuffled ones, from new weights, and with the worst weights kept
(`fp.masks_from_scores(..., invert=True)`); a method that picks weights well loses by each.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ..masks import MaskSet


def shuffle_masks(
    masks: Mapping[str, Tensor], *, generator: torch.Generator | None = None
) -> MaskSet:
    """Each mask's entries in random order: every layer keeps its number, not its weights."""
    shuffled = {}
    for name, mask in masks.items():
        order = torch.randperm(mask.numel(), generator=generator).to(mask.device)
        shuffled[name] = torch.empty_like(mask).copy_(mask.flatten()[order].view(mask.shape))
    return MaskSet(shuffled, masks.parameters if isinstance(masks, MaskSet) else None)


def reinitialize(
    model: nn.Module,
    masks: MaskSet | None = None,
    *,
    init: Callable[[nn.Module], None] | None = None,
) -> None:
    """Draws new first weights, in place, and zeroes the pruned ones again.

    `init(module)` is called for each module, as by `model.apply`; by default its
    `reset_parameters`. The random numbers are torch's, so `torch.manual_seed` decides them.
    """
    if init is None:
        own = {path: m for path, m in model.named_modules() if [*m.parameters(recurse=False)]}
        missing = [p or type(m).__name__ for p, m in own.items() if _reset_of(m) is None]
        if missing:
            raise ValueError(
                f"{', '.join(missing)} has parameters but no reset_parameters(); pass init=, a "
                "function that initialises a module"
            )
    with torch.no_grad():
        model.apply(init or _reset)
    if masks is not None:
        masks.apply(model)


def _reset(module: nn.Module) -> None:
    reset = _reset_of(module)
    if reset is not None:
        reset()


def _reset_of(module: nn.Module) -> Callable[[], object] | None:
    # MultiheadAttention's is private.
    found = getattr(module, "reset_parameters", getattr(module, "_reset_parameters", None))
    return found if callable(found) else None
