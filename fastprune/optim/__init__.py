"""The methods that are optimizers: `step()`, `masks()`, `finish()`."""

from .groups import prunable_groups
from .gsm import GSM
from .sdprun import SDprun

__all__ = ["GSM", "SDprun", "prunable_groups"]
