"""The specification: every operator in plain PyTorch, under the operator's own name."""

from .select import block_scores, select_masks, select_threshold

__all__ = ["block_scores", "select_masks", "select_threshold"]
