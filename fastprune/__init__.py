"""fastprune: optimizers and kernels that prune neural networks."""

from . import ops, optim, schedules
from .deploy import compact
from .masks import MaskSet, num_kept
from .methods import (
    Curve,
    barrier,
    directional_scores,
    find_curve,
    losses_along,
    magnitude,
    segment,
)
from .ops import (
    build_info,
    global_topk,
    global_topk_masks,
    layer_topk,
    layer_topk_masks,
    use_reference,
)
from .tickets import mask_gradients, rewind

__all__ = [
    "Curve",
    "MaskSet",
    "barrier",
    "build_info",
    "compact",
    "directional_scores",
    "find_curve",
    "global_topk",
    "global_topk_masks",
    "layer_topk",
    "layer_topk_masks",
    "losses_along",
    "magnitude",
    "mask_gradients",
    "num_kept",
    "ops",
    "optim",
    "rewind",
    "schedules",
    "segment",
    "use_reference",
]
__version__ = "0.1.0"
