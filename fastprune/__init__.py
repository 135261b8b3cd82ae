"""fastprune: optimizers and kernels that prune neural networks."""

from . import ops, optim, schedules
from .masks import MaskSet, num_kept
from .methods import (
    LayerCollapse,
    erk,
    force,
    iter_snip,
    magnitude,
    masks_from_scores,
    random,
    reinitialize,
    scores,
    shuffle_masks,
    uniform,
)
from .methods.grasp import grasp
from .methods.prospr import prospr
from .methods.snip import snip
from .methods.synflow import synflow
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
    "LayerCollapse",
    "MaskSet",
    "build_info",
    "erk",
    "force",
    "global_topk",
    "global_topk_masks",
    "grasp",
    "iter_snip",
    "layer_topk",
    "layer_topk_masks",
    "magnitude",
    "mask_gradients",
    "masks_from_scores",
    "num_kept",
    "ops",
    "optim",
    "prospr",
    "random",
    "reinitialize",
    "rewind",
    "schedules",
    "scores",
    "shuffle_masks",
    "snip",
    "synflow",
    "uniform",
    "use_reference",
]
__version__ = "0.1.0"
