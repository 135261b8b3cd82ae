"""What Dirichlet pruning has found: an order of the channels of each layer, and its posterior."""

from collections.abc import Iterator, Mapping
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from .budget import KINDS, Greedy, within_budget
from .removal import ChannelSets, Counts

BUDGETS = ("keep", "ratio", "mass", *KINDS)


class DirichletRanks(Mapping[str, Tensor]):
    """The channels or neurons of each layer, by name, the most important first (int64, on the CPU).

    Layers that are added together share their channels and are one entry, named after the first;
    `layers` says which they are. `concentration`, `mean` and `variance` (float64, in the order of
    the channels themselves) are those of the posterior of each entry's switch; a mean times the
    number of channels is 1 for an average channel.
    """

    def __init__(
        self,
        concentration: Mapping[str, Tensor],
        layers: Mapping[str, tuple[str, ...]] | None = None,
        example_input: Any = None,
    ) -> None:
        for name, phi in concentration.items():
            if phi.dim() != 1 or not phi.numel() or not ((phi > 0) & phi.isfinite()).all():
                raise ValueError(
                    f"concentration[{name!r}] must hold a positive number for each channel, got "
                    f"{phi}"
                )
        self.concentration = {n: c.detach().double().cpu() for n, c in concentration.items()}
        self.layers = {name: (name,) for name in concentration} | dict(layers or {})
        self.example_input = example_input
        self.mean = {name: c / c.sum() for name, c in self.concentration.items()}
        self.variance = {
            name: mean * (1 - mean) / (self.concentration[name].sum() + 1)
            for name, mean in self.mean.items()
        }
        self._order = {
            name: c.sort(descending=True, stable=True).indices
            for name, c in self.concentration.items()
        }

    def __getitem__(self, name: str) -> Tensor:
        return self._order[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._order)

    def __len__(self) -> int:
        return len(self._order)

    def __eq__(self, other: object) -> bool:
        """Whether layers and concentrations are the same."""
        if not isinstance(other, DirichletRanks):
            return NotImplemented
        ours, theirs = self.concentration, other.concentration
        return self.layers == other.layers and all(
            torch.equal(phi, theirs[name]) for name, phi in ours.items()
        )

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name}: {len(order)}" for name, order in self.items())
        return f"DirichletRanks({sizes})"

    def counts(
        self,
        model: nn.Module | None = None,
        example_input: Any = None,
        *,
        keep: Counts | None = None,
        ratio: float | None = None,
        mass: float | None = None,
        flops: float | None = None,
        parameters: float | None = None,
        milliseconds: float | None = None,
        progress: bool = True,
    ) -> dict[str, int]:
        """How many channels of each layer stay, at least one. Exactly one of these says it:

        Args:
            keep: a mapping of layer name to count; the layers not named keep all.
            ratio: the share of the channels of all layers that stay, the ones with the largest
                mean times number of channels.
            mass: in each layer the fewest channels whose means add up to it.
            flops, parameters: at most 1, the share of the whole model that may be left; above 1, a
                number. Channels go as for `ratio`, the fewest that suffice. Flops are two for each
                multiplication in convolutions and linear layers, for `example_input`.
            milliseconds: what one pass of `example_input` may take. Candidates are made and timed
                on the model's device, about log2(number of channels) of them. Of several processes
                let one measure, and give the others its counts as `keep`.
            model: needed for the last three, as is `example_input` unless the ranks hold one.
            progress: show a bar while candidates are timed.
        """
        kind, value = self._budget(keep, ratio, mass, flops, parameters, milliseconds)
        sets = None
        if kind in KINDS:
            if model is None:
                raise ValueError(f"{kind} depend on the model; use counts(model, {kind}=...)")
            sets = self._sets_of(model, example_input)
        return self._counts(kind, value, sets, progress)

    def prune(
        self,
        model: nn.Module,
        example_input: Any = None,
        *,
        keep: Counts | None = None,
        ratio: float | None = None,
        mass: float | None = None,
        flops: float | None = None,
        parameters: float | None = None,
        milliseconds: float | None = None,
        progress: bool = True,
    ) -> nn.Module:
        """A smaller model without the least important channels, to be fine-tuned as any other.

        It computes what `model`, which is not changed, does when nothing reads those channels.
        Exactly one argument says how many stay; see `counts`.

        Args:
            example_input: a tensor that the model takes, or a tuple of its arguments; without it
                the one that the ranks hold.
        """
        kind, value = self._budget(keep, ratio, mass, flops, parameters, milliseconds)
        sets = self._sets_of(model, example_input)
        return sets.removed(self._lists(), self._counts(kind, value, sets, progress))

    def _counts(
        self, kind: str, value: Any, sets: ChannelSets | None, progress: bool
    ) -> dict[str, int]:
        if kind == "keep":
            return self._kept(value)
        if kind == "mass":
            return {name: self._covering(name, value) for name in self}
        greedy = Greedy(self._shares())
        if sets is not None and kind in KINDS:
            return within_budget(greedy, sets, self._lists(), kind, value, progress)
        total = sum(len(order) for order in self.values())
        return greedy.counts(min(len(greedy), total - round(value * total)))

    def _lists(self) -> dict[str, list[int]]:
        return {name: order.tolist() for name, order in self.items()}

    def _shares(self) -> dict[str, list[float]]:
        return {
            name: (self.mean[name][order] * len(order)).tolist() for name, order in self.items()
        }

    def _kept(self, keep: Any) -> dict[str, int]:
        if not isinstance(keep, Mapping):
            raise TypeError(
                f"keep must be a mapping of layer name to count, got {type(keep).__name__}"
            )
        for name, count in keep.items():
            if name not in self._order:
                raise ValueError(self._unknown(name))
            most = len(self._order[name])
            if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= most:
                raise ValueError(f"keep[{name!r}] must be an integer from 1 to {most}, got {count}")
        return {name: keep.get(name, len(order)) for name, order in self.items()}

    def _unknown(self, name: object) -> str:
        for first, layers in self.layers.items():
            if name in layers:
                return f"keep has {name!r}, whose channels are those of {first!r}; use that name"
        return f"keep has {name!r}, which is no ranked layer; ranked are {', '.join(self)}"

    def _covering(self, name: str, mass: float) -> int:
        covered = self.mean[name][self[name]].cumsum(0)
        short = int((covered < mass - 1e-12).sum())  # rounding of the sum
        return min(short + 1, len(covered))

    def _budget(self, *values: Any) -> tuple[str, Any]:
        given = {n: value for n, value in zip(BUDGETS, values, strict=True) if value is not None}
        if len(given) != 1:
            raise ValueError(
                f"give exactly one of {', '.join(BUDGETS)}, got {', '.join(given) or 'none'}"
            )
        ((kind, value),) = given.items()
        if kind != "keep":
            most = 1 if kind in ("ratio", "mass") else float("inf")
            real = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not (real and isfinite(value) and 0 < value <= most):
                expected = "a number above 0" + (" and at most 1" if most == 1 else "")
                raise ValueError(f"{kind} must be {expected}, got {value!r}")
        return kind, value

    def _sets_of(self, model: nn.Module, example_input: Any) -> ChannelSets:
        example = self.example_input if example_input is None else example_input
        if example is None:
            raise ValueError("these ranks hold no example_input; give one")
        sets = ChannelSets(model, example)
        sizes = {name: len(order) for name, order in self.items()}
        for name, size in sizes.items():
            if sets.names.get(name) != self.layers[name] or sets.sizes[name] != size:
                found = f"{sets.sizes[name]}" if name in sets.names else "no such"
                raise ValueError(
                    f"these ranks are of another model: they have {size} channels of "
                    f"{', '.join(self.layers[name])}, this one has {found} that can be removed"
                )
        return sets
