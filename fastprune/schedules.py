"""Sparsity as a function of the step, for optimizers that take one."""

from dataclasses import dataclass
from numbers import Real
from operator import index


@dataclass(frozen=True)
class Schedule:
    """`initial` until `first_step`, `final` from `last_step` on, and a power of time between.

    Called with a step, counted from 0, it returns a sparsity. A plain value: it can be compared,
    copied and pickled with its optimizer.
    """

    initial: float
    final: float
    first_step: int = 0
    last_step: int = 0
    power: int = 1

    def __post_init__(self) -> None:
        for name in ("initial", "final"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Real):
                raise TypeError(f"{name} must be a number in [0, 1], got {value!r}")
            if not 0 <= float(value) <= 1:
                hint = f"; {value}% is {value / 100}" if 1 < float(value) <= 100 else ""
                raise ValueError(
                    f"{name} must be in [0, 1], the fraction of weights to prune, got {value}{hint}"
                )
        for name in ("first_step", "last_step"):
            value = getattr(self, name)
            if isinstance(value, bool) or not hasattr(value, "__index__"):
                raise TypeError(f"{name} must be an integer, got {value!r}")
        if not 0 <= self.first_step <= self.last_step:
            raise ValueError(
                "steps must satisfy 0 <= first_step <= last_step, got "
                f"{self.first_step} and {self.last_step}"
            )

    def __call__(self, step: int) -> float:
        step = index(step)
        if step >= self.last_step:
            return self.final  # as it was typed, so that the count in the end is exact
        if step <= self.first_step:
            return self.initial
        left = (self.last_step - step) / (self.last_step - self.first_step)
        return float(self.final + (self.initial - self.final) * left**self.power)


def constant(sparsity: float) -> Schedule:
    return Schedule(sparsity, sparsity)


def linear(final: float, last_step: int, *, initial: float = 0.0, first_step: int = 0) -> Schedule:
    """From `initial` at `first_step` to `final` at `last_step` in equal steps."""
    return Schedule(initial, final, first_step, last_step, power=1)


def cubic(final: float, last_step: int, *, initial: float = 0.0, first_step: int = 0) -> Schedule:
    """Fast at first, slow in the end (Zhu & Gupta 2017, eq. 1)."""
    return Schedule(initial, final, first_step, last_step, power=3)
