"""The baselines every method is measured against."""

from typing import Literal

from torch import nn

from ..masks import MaskSet, Sparsity, num_kept
from ..ops import global_topk_masks, layer_topk_masks
from ..ops.select import checked_block, num_blocks
from ..structure import prunable_parameters

Scope = Literal["global", "layer"]
SCOPES = ("global", "layer")


def magnitude(
    model: nn.Module,
    sparsity: Sparsity,
    *,
    scope: Scope = "global",
    block: tuple[int, int] = (1, 1),
) -> MaskSet:
    """Masks that keep the weights of largest |w|; the model is not changed.

    `scope="global"` ranks all prunable weights together, "layer" gives each layer the same
    sparsity. With `block=(outputs, inputs)` whole blocks are ranked by their sum of |w| and the
    sparsity counts blocks. Exactly `num_kept(sparsity, N)` of N stay, in each layer for "layer".
    """
    if scope not in SCOPES:
        raise ValueError(f"scope must be one of {', '.join(map(repr, SCOPES))}, got {scope!r}")
    weights = prunable_parameters(model)
    if not weights:
        raise ValueError(
            f"{type(model).__name__} has no convolution, linear or attention weight to prune"
        )
    tensors = list(weights.values())
    sizes = [num_blocks(weight.shape, checked_block(block)) for weight in tensors]
    if scope == "global":
        count = num_kept(sparsity, sum(sizes))
        masks = global_topk_masks(tensors, count, score="magnitude", block=block)
    else:
        counts = [num_kept(sparsity, size) for size in sizes]
        masks = layer_topk_masks(tensors, counts, score="magnitude", block=block)
    return MaskSet(dict(zip(weights, masks, strict=True)), weights)
