"""The methods that are optimizers: `step()`, `masks()`, `finish()`."""

from .groups import prunable_groups
from .gsm import GSM

__all__ = ["GSM", "prunable_groups"]
