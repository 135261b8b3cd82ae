"""The methods that are optimizers: drop-in replacements for `torch.optim.SGD`."""

from .groups import channel_groups, prunable_groups
from .gsm import GSM
from .sdprun import SDprun

__all__ = ["GSM", "SDprun", "channel_groups", "prunable_groups"]
