"""The methods that are optimizers: drop-in replacements for `torch.optim.SGD`."""

from .aswl import ASWL
from .groups import channel_groups, prunable_groups
from .gsm import GSM
from .masked import masked
from .masked_sgd import MaskedSGD
from .sdprun import SDprun

__all__ = ["ASWL", "GSM", "MaskedSGD", "SDprun", "channel_groups", "masked", "prunable_groups"]
