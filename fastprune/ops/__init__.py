"""Operators: exact selection over lists of tensors, Dirichlet distributions, channel switches."""

from .dirichlet import dirichlet_kl, dirichlet_sample
from .native import BuildInfo, build_info, use_reference
from .select import Selection, global_topk, global_topk_masks, layer_topk, layer_topk_masks
from .switch import channel_switch

__all__ = [
    "BuildInfo",
    "Selection",
    "build_info",
    "channel_switch",
    "dirichlet_kl",
    "dirichlet_sample",
    "global_topk",
    "global_topk_masks",
    "layer_topk",
    "layer_topk_masks",
    "use_reference",
]
