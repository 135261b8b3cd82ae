"""Triton twins of operators, as plain functions with the operators' own signatures.

They are not registered with the dispatcher: tests, benchmarks and GPUs of other vendors call them
by name. Importing this package imports Triton; importing `fastprune` does not.
"""

from .sdprun import sdprun_update_
from .select import block_scores, select_masks, select_threshold

__all__ = ["block_scores", "sdprun_update_", "select_masks", "select_threshold"]
