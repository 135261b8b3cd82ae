"""The specification: every operator in plain PyTorch, under the operator's own name."""

from .aswl import aswl_step_
from .dirichlet import dirichlet_kl, dirichlet_sample, dirichlet_sample_backward
from .gsm import gsm_step_, gsm_update_
from .masked_sgd import masked_sgd_
from .sdprun import sdprun_guard_, sdprun_threshold_, sdprun_update_
from .select import block_scores, select_masks, select_threshold
from .sparse import sparse_network, sparse_profile, sparse_release
from .switch import channel_switch, channel_switch_backward

__all__ = [
    "aswl_step_",
    "block_scores",
    "channel_switch",
    "channel_switch_backward",
    "dirichlet_kl",
    "dirichlet_sample",
    "dirichlet_sample_backward",
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
