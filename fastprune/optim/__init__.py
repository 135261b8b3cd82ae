"""The methods that are optimizers: `step()`, `masks()`, `finish()`."""

from .groups import prunable_groups
from .gsm import GSM
from .masked import masked
from .masked_sgd import MaskedSGD

__all__ = ["GSM", "MaskedSGD", "masked", "prunable_groups"]
