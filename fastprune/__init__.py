"""fastprune: optimizers and kernels that prune neural networks."""

from . import ops, optim, schedules
from .deploy import (
    FormatError,
    SparseConv2d,
    SparseLinear,
    compact,
    load_sparse,
    save_sparse,
    sparsify,
)
from .masks import MaskSet, num_kept
from .methods import (
    Curve,
    DirichletRanks,
    LayerCollapse,
    barrier,
    directional_scores,
    erk,
    find_curve,
    force,
    iter_snip,
    losses_along,
    magnitude,
    masks_from_scores,
    random,
    reinitialize,
    scores,
    segment,
    shuffle_masks,
    uniform,
)
from .methods.dirichlet import dirichlet
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
    "Curve",
    "DirichletRanks",
    "FormatError",
    "LayerCollapse",
    "MaskSet",
    "SparseConv2d",
    "SparseLinear",
    "barrier",
    "build_info",
    "compact",
    "directional_scores",
    "dirichlet",
    "erk",
    "find_curve",
    "force",
    "global_topk",
    "global_topk_masks",
    "grasp",
    "iter_snip",
    "layer_topk",
    "layer_topk_masks",
    "load_sparse",
    "losses_along",
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
    "save_sparse",
    "schedules",
    "scores",
    "segment",
    "shuffle_masks",
    "snip",
    "sparsify",
    "synflow",
    "uniform",
    "use_reference",
]
__version__ = "0.1.0"
