"""Pictures and tables of what a method did."""

from .feature_maps import plot_feature_maps
from .pictures import plot_losses, plot_sparsities
from .posterior import plot_posterior

__all__ = ["plot_feature_maps", "plot_losses", "plot_posterior", "plot_sparsities"]
