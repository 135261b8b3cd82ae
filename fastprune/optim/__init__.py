"""The methods that are optimizers: `step()`, `masks()`, `finish()`."""

from .groups import channel_groups, prunable_groups
from .gsm import GSM

__all__ = ["GSM", "channel_groups", "prunable_groups"]
