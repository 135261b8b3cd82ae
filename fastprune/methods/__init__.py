"""Methods that are functions: they score or rank weights and return masks.

Functions named like their module (`prospr`, `snip`, `grasp`, `synflow`) are exported one level up.
"""

from .baselines import magnitude
from .distributions import erk, uniform
from .noise import random
from .sanity import reinitialize, shuffle_masks
from .scoring import scores
from .selection import LayerCollapse, masks_from_scores
from .snip import force, iter_snip

__all__ = [
    "LayerCollapse",
    "erk",
    "force",
    "iter_snip",
    "magnitude",
    "masks_from_scores",
    "random",
    "reinitialize",
    "scores",
    "shuffle_masks",
    "uniform",
]
