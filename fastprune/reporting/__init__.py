"""Pictures and tables of what a method did."""

from .pictures import plot_losses

__all__ = ["plot_losses"]
