"""The specification: every operator in plain PyTorch, under the operator's own name."""

from .gsm import gsm_step_, gsm_update_
from .masked_sgd import masked_sgd_
from .sdprun import sdprun_guard_, sdprun_threshold_, sdprun_update_
from .select import block_scores, select_masks, select_threshold
from .sparse import sparse_network, sparse_profile, sparse_release

__all__ = [
    "block_scores",
    "gsm_step_",
    "gsm_update_",
    "masked_sgd_",
    "sdprun_guard_",
    "sdprun_threshold_",
    "sdprun_update_",
    "select_masks",
    "select_threshold",
    "sparse_network",
    "sparse_profile",
    "sparse_release",
]
