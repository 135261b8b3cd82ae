"""A benchmark case is data."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

OURS = "fastprune"

# A candidate is a function of the inputs that returns the call to time, so state that a call needs
# (an optimizer, say) is made untimed and belongs to that candidate alone.
Prepare = Callable[[Any], Callable[[], Any]]


@dataclass(frozen=True)
class Eager:
    """A call that cannot be captured in a CUDA graph: no capture is tried."""

    function: Callable[[], Any]

    def __call__(self) -> Any:
        return self.function()


class WrongAnswerError(AssertionError):
    """An answer that is not the expected one; the case is not timed."""


@dataclass(frozen=True)
class Case:
    name: str  # <operator>[.<variant>]/<shape label>/<dtype>
    make: Callable[[torch.device, int], Any]  # (device, seed) -> inputs
    function: Prepare
    rivals: Mapping[str, Prepare]
    expect: Callable[[Any], Any]  # the right answer, by another way than the operator's
    check: Callable[[Any, Any], None]  # (expected, answer): raises WrongAnswerError
    reads: Callable[[Any], list[Tensor]]  # what the bare read pass reads
    bytes_moved: int  # the fewest an implementation can move: inputs once, outputs once
    flops: int
    devices: tuple[str, ...] = ("cpu", "cuda")
    rivals_on: Mapping[str, Mapping[str, Prepare]] = field(default_factory=dict)  # by device

    @property
    def label(self) -> str:
        return self.name.split("/")[1]

    def candidates(self, device: str) -> dict[str, Prepare]:
        """Ours first, then the rivals that exist on this device."""
        return {OURS: self.function, **self.rivals, **self.rivals_on.get(device, {})}
