"""Training loops, data and the demonstration."""

from .data import Digits, load_digits
from .loop import accuracy, train

__all__ = ["Digits", "accuracy", "load_digits", "train"]
