"""Operators in Triton, as plain functions with the operators' own signatures.

Where Triton is the winner (`WINNERS` in schemas.py), `ops/native.py` registers the function for
CUDA; the others are twins that tests, benchmarks and GPUs of other vendors call by name. Importing
this package imports Triton; importing `fastprune` does not.
"""

from .sdprun import sdprun_update_
from .select import block_scores, select_masks, select_threshold
from .switch import channel_switch, channel_switch_backward

__all__ = [
    "block_scores",
    "channel_switch",
    "channel_switch_backward",
    "sdprun_update_",
    "select_masks",
    "select_threshold",
]
