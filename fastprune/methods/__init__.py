"""Methods that are functions: they score or rank weights and return masks."""

from .baselines import magnitude

__all__ = ["magnitude"]
