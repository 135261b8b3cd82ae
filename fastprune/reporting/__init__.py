"""Pictures and tables of what a method did."""

from .pictures import plot_losses, plot_sparsities

__all__ = ["plot_losses", "plot_sparsities"]
