"""Operators: exact selection over lists of tensors."""

from .native import BuildInfo, build_info, use_reference
from .select import Selection, global_topk, global_topk_masks, layer_topk, layer_topk_masks

__all__ = [
    "BuildInfo",
    "Selection",
    "build_info",
    "global_topk",
    "global_topk_masks",
    "layer_topk",
    "layer_topk_masks",
    "use_reference",
]
