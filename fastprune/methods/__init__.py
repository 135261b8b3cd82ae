"""Methods that are functions: they score or rank weights and return masks."""

from .baselines import magnitude
from .valley import Curve, barrier, directional_scores, find_curve, losses_along, segment

__all__ = [
    "Curve",
    "barrier",
    "directional_scores",
    "find_curve",
    "losses_along",
    "magnitude",
    "segment",
]
