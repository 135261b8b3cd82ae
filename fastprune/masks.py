"""Masks of a model's weights, and the exact count behind a sparsity."""

from collections.abc import Iterator, Mapping
from decimal import Decimal
from fractions import Fraction
from math import floor
from numbers import Real
from operator import index
from typing import NamedTuple, SupportsIndex
from weakref import ref

import torch
from torch import Tensor, nn

from .structure import prunable_parameters

Sparsity = float | Decimal | Fraction


def num_kept(sparsity: Sparsity, total: SupportsIndex) -> int:
    """How many of `total` weights stay: total - round_half_up(sparsity * total), exactly.

    The product is formed from the decimal number that was typed, not from its binary neighbour:
    0.95 of 1000 keeps 50 and 0.98 of 100 keeps 2. Decimal, Fraction and numpy numbers work too.
    """
    if isinstance(total, bool) or not hasattr(total, "__index__"):
        raise TypeError(f"total must be an integer, got {type(total).__name__} {total!r}")
    size = index(total)
    if size < 0:
        raise ValueError(f"total must be a count of weights, at least 0, got {size}")
    return size - floor(_exact(sparsity) * size + Fraction(1, 2))


def _exact(sparsity: object) -> Fraction:
    if isinstance(sparsity, bool) or not isinstance(sparsity, (Real, Decimal)):
        hint = "; convert it with float()" if isinstance(sparsity, (str, Tensor)) else ""
        raise TypeError(
            "sparsity must be a number in [0, 1], the fraction of weights to prune, got "
            f"{type(sparsity).__name__} {sparsity!r}{hint}"
        )
    try:
        # str() of a float is the shortest decimal that means it, also of numpy's narrower floats.
        exact = Fraction(str(sparsity))
    except ValueError:  # NaN and infinity
        exact = Fraction(-1)
    if not 0 <= exact <= 1:
        raise ValueError(
            f"sparsity must be in [0, 1], the fraction of weights to prune, got {sparsity}"
            + ("; 90% is 0.9" if 1 < exact <= 100 else "")
        )
    return exact


class LayerCount(NamedTuple):
    """How much of one weight is kept."""

    num_kept: int
    total: int

    @property
    def num_pruned(self) -> int:
        return self.total - self.num_kept

    @property
    def sparsity(self) -> float:
        return self.num_pruned / self.total if self.total else 0.0


class MaskSet(Mapping[str, Tensor]):
    """Parameter name -> bool tensor of the parameter's shape, True where a weight is kept.

    The mapping is fixed once made; the tensors are those that were given, not copies.
    `parameters`, by the same names, are remembered as long as they exist: an optimizer that is
    given `model.parameters()` without names finds out by them which mask is whose.
    """

    def __init__(
        self, masks: Mapping[str, Tensor], parameters: Mapping[str, Tensor] | None = None
    ) -> None:
        if not isinstance(masks, Mapping):
            raise TypeError(
                f"masks must be a mapping of parameter name to bool tensor, got "
                f"{type(masks).__name__}"
            )
        for name, mask in masks.items():
            if not isinstance(name, str):
                raise TypeError(f"masks must be named by strings, got {name!r}")
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
                got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
                raise TypeError(
                    f"the mask of {name} must be a bool tensor, True where a weight is kept, got "
                    f"{got}; for a 0/1 tensor pass mask.bool()"
                )
        self._masks = dict(masks)
        known = parameters or {}
        self._owners = {name: ref(known[name]) for name in self._masks if name in known}

    @classmethod
    def of(cls, model: nn.Module) -> "MaskSet":
        """The non-zeros of a model's prunable weights."""
        weights = prunable_parameters(model)
        return cls({name: weight.detach() != 0 for name, weight in weights.items()}, weights)

    def __getitem__(self, name: str) -> Tensor:
        return self._masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def __reduce__(self) -> tuple[type["MaskSet"], tuple[dict[str, Tensor]]]:
        """Copies and files have the masks alone."""
        return type(self), (self._masks,)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, MaskSet):
            return NotImplemented
        return self.keys() == other.keys() and all(
            self[name].device == other[name].device and torch.equal(self[name], other[name])
            for name in self
        )

    __hash__ = None  # type: ignore[assignment]

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The parameters that the masks were made for, as far as they are known and still exist."""
        alive = {name: owner() for name, owner in self._owners.items()}
        return {name: parameter for name, parameter in alive.items() if parameter is not None}

    @property
    def layers(self) -> dict[str, LayerCount]:
        """Kept and total of each weight."""
        return {
            name: LayerCount(int(mask.count_nonzero()), mask.numel()) for name, mask in self.items()
        }

    @property
    def total(self) -> int:
        return sum(mask.numel() for mask in self.values())

    @property
    def num_kept(self) -> int:
        return sum(layer.num_kept for layer in self.layers.values())

    @property
    def num_pruned(self) -> int:
        return self.total - self.num_kept

    @property
    def sparsity(self) -> float:
        """The fraction of pruned weights; 0 where there is no weight at all."""
        return LayerCount(self.num_kept, self.total).sparsity

    def to(self, device: torch.device | str) -> "MaskSet":
        return MaskSet({name: mask.to(device) for name, mask in self.items()}, self.parameters)

    def apply(self, model: nn.Module) -> None:
        """Writes +0.0 into every pruned weight of the model, in place.

        Everything is checked before the first write: an error leaves the model as it was. The
        zeros are not protected from a later optimizer step.
        """
        pairs = self._checked_pairs(model)
        with torch.no_grad():
            for parameter, mask in pairs:
                parameter.masked_fill_(~mask, 0.0)

    def _checked_pairs(self, model: nn.Module) -> list[tuple[nn.Parameter, Tensor]]:
        parameters = dict(model.named_parameters(remove_duplicate=False))
        first_names: dict[int, str] = {}
        for name, mask in self.items():
            if name not in parameters:
                raise ValueError(unknown_name(name, list(parameters)))
            parameter = parameters[name]
            for what in ("shape", "device"):
                expected, got = getattr(parameter, what), getattr(mask, what)
                if expected != got:
                    raise ValueError(
                        f"the mask of {name} must have the {what} of its parameter, "
                        f"{_plain(expected)}, got {_plain(got)}"
                        + (f"; use masks.to({str(expected)!r})" if what == "device" else "")
                    )
            first = first_names.setdefault(id(parameter), name)
            if first != name and not torch.equal(self[first], mask):
                raise ValueError(
                    f"{first} and {name} are one tied parameter, but their masks differ; "
                    "keep one of the two masks"
                )
        return [(parameters[name], self[name]) for name in first_names.values()]

    def __repr__(self) -> str:
        layers = self.layers
        kept = sum(layer.num_kept for layer in layers.values())
        whole = LayerCount(kept, self.total)
        head = (
            f"MaskSet: {len(self)} weight{'' if len(self) == 1 else 's'}, {kept:,} of "
            f"{whole.total:,} kept, sparsity {whole.sparsity:.2%}"
        )
        width = max(map(len, layers), default=0)
        shapes = [str(tuple(mask.shape)) for mask in self.values()]
        shape_width = max(map(len, shapes), default=0)
        return "\n".join(
            [head]
            + [
                f"  {name:<{width}}  {shape:<{shape_width}}  {layer.sparsity:7.2%}  "
                f"{layer.num_kept:,} of {layer.total:,} kept"
                for (name, layer), shape in zip(layers.items(), shapes, strict=True)
            ]
        )


def _plain(value: object) -> str:
    return str(tuple(value)) if isinstance(value, torch.Size) else str(value)


def unknown_name(name: str, known: list[str]) -> str:
    # torch.compile and DistributedDataParallel put a prefix before every name.
    similar = [k for k in known if k.endswith(f".{name}") or name.endswith(f".{k}")]
    shown = similar or known[:5]
    return (
        f"the model has no parameter named {name!r}; names are those of model.named_parameters(), "
        f"{'such as ' if shown else 'and it has none'}{', '.join(map(repr, shown))}"
        + ("; mask the model inside its wrapper, or rename the masks" if similar else "")
    )
