"""Methods that are functions: they score weights and return masks, or rank channels.

Functions named like their module (`prospr`, `snip`, `grasp`, `synflow`, `dirichlet`) are exported
one level up.
"""

from .baselines import magnitude
from .dirichlet_ranks import DirichletRanks
from .distributions import erk, uniform
from .noise import random
from .sanity import reinitialize, shuffle_masks
from .scoring import scores
from .selection import LayerCollapse, masks_from_scores
from .snip import force, iter_snip
from .valley import Curve, barrier, directional_scores, find_curve, losses_along, segment

__all__ = [
    "Curve",
    "DirichletRanks",
    "LayerCollapse",
    "barrier",
    "directional_scores",
    "erk",
    "find_curve",
    "force",
    "iter_snip",
    "losses_along",
    "magnitude",
    "masks_from_scores",
    "random",
    "reinitialize",
    "scores",
    "segment",
    "shuffle_masks",
    "uniform",
]
