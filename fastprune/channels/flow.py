"""What an analysis of a model's channels consists of."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

EVALUATION, TRAINING = 0, 1


@dataclass(eq=False)
class Flow:
    """A tensor that carries channels along one of its dimensions.

    `emits` has a row for evaluation and one for training: the value a channel has at every
    position and for every input of the model, NaN where there is no such value.
    """

    dim: int
    labels: list[int]
    emits: Tensor
    storage: object = field(default_factory=object)


@dataclass(frozen=True)
class Slot:
    """A dimension of a parameter or buffer that channels index.

    With `groups` above 1 the tensor is read as (groups, dim 0 / groups, dim 1, ...), and the labels
    run over groups and `dim`: columns of a grouped convolution, rows of a transposed one.
    """

    name: str
    dim: int
    labels: tuple[int, ...]
    groups: int = 1


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer and the channels it makes.

    `rows` are its weight and bias, `norm` the affine parameters of a norm that reads just them.
    A depthwise layer passes channels on and makes none.
    """

    name: str
    labels: tuple[int, ...]
    rows: tuple[Slot, ...]
    emits: Tensor
    depthwise: bool = False
    norm: tuple[Slot, ...] = ()


@dataclass(frozen=True)
class Sink:
    """A layer that mixes the channels it reads; `columns` is their place in its weight."""

    name: str
    columns: Slot
    emits: Tensor
    at_border: str  # why a constant other than 0 cannot become a bias, or ""
    running_mean: str | None  # of a batch norm that alone reads a layer without bias


class Channels:
    """The channels of a model: every one has a label, and equal `root`s live and die together.

    Pinned channels stay: they are the model's output, or something reads them that is not known to
    treat channels one by one.
    """

    def __init__(self) -> None:
        self.layers: dict[str, Layer] = {}
        self.sinks: list[Sink] = []
        self.slots: list[Slot] = []
        self.unused: list[str] = []  # parameters that the traced run does not read
        self.balanced: list[list[list[int]]] = []  # groups of labels that must stay equally large
        self._parents: list[int] = []
        self._reasons: dict[int, str] = {}

    def fresh(self, count: int) -> list[int]:
        start = len(self._parents)
        self._parents += range(start, start + count)
        return list(range(start, start + count))

    def root(self, label: int) -> int:
        while self._parents[label] != label:
            self._parents[label] = label = self._parents[self._parents[label]]
        return label

    def roots(self, labels: Iterable[int]) -> tuple[int, ...]:
        return tuple(map(self.root, labels))

    def join(self, ours: Iterable[int], theirs: Iterable[int]) -> None:
        for a, b in zip(self.roots(ours), self.roots(theirs), strict=True):
            first, second = sorted((self.root(a), self.root(b)))
            self._parents[second] = first
            if (reason := self._reasons.pop(second, None)) is not None:
                self._reasons.setdefault(first, reason)

    def pin(self, labels: Iterable[int], reason: str) -> None:
        for root in self.roots(labels):
            self._reasons.setdefault(root, reason)

    def why_pinned(self, label: int) -> str | None:
        return self._reasons.get(self.root(label))


def varying(count: int) -> Tensor:
    return torch.full((2, count), torch.nan, dtype=torch.float64)
