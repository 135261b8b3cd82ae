"""From scores to masks: the selection that every method here ends with."""

import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, TypedDict

import torch
from torch import Tensor, nn

from ..masks import MaskSet, Sparsity, num_kept
from ..ops import global_topk_masks, layer_topk_masks
from ..ops.select import _expanded, checked_block
from ..structure import prunable_parameters
from . import channels
from .baselines import SCOPES, Scope
from .objective import Tensors

Granularity = Literal["weight", "channel"] | tuple[int, int]
Rank = Literal["magnitude", "value"]
# One sparsity, or one for each weight by name, such as `fp.erk` gives.
Sparsities = Sparsity | Mapping[str, Sparsity]


class LayerCollapse(ValueError):
    """A layer would lose all its weights, and the network its signal."""


class Options(TypedDict, total=False):
    """What all methods understand; `masks_from_scores` says what it means."""

    granularity: Granularity
    scope: Scope
    min_kept_per_layer: int
    exclude: Collection[str] | None


@dataclass(frozen=True)
class Selection:
    """Which weights, in which entries, by which rank: all that is fixed before the scores."""

    weights: Tensors
    sparsity: Sparsities
    rank: Rank = "magnitude"
    granularity: Granularity = "weight"
    scope: Scope = "global"
    min_kept_per_layer: int = 0
    layers: dict[str, channels.Layer] = field(default_factory=dict)
    invert: bool = False
    owners: Tensors = field(default_factory=dict)  # the parameters that the masks are for

    @property
    def names(self) -> list[str]:
        """Of what needs scores."""
        companions = (vector for layer in self.layers.values() for vector in layer.companions)
        return list(dict.fromkeys([*self.weights, *companions]))

    def masks(
        self,
        scores: Tensors,
        sparsity: Sparsities | None = None,
        *,
        within: MaskSet | None = None,
        final: bool = True,
    ) -> MaskSet:
        """The best entries; on the way there by another sparsity, and of those `within` keeps."""
        sparsity = self.sparsity if sparsity is None else sparsity
        entries = self._entries(scores)
        _check_finite(entries)
        if self.rank == "magnitude":
            entries = {name: entry.abs() for name, entry in entries.items()}
        if self.invert:
            entries = {name: -entry for name, entry in entries.items()}
        if within is not None:
            alive = self._entries({name: within[name].float() for name in scores})
            entries = {n: e.masked_fill(alive[n] == 0, -torch.inf) for n, e in entries.items()}
        kept = self._choose(entries, sparsity)
        self._check_layers(kept, sparsity)
        if final and self.rank == "magnitude" and not self.invert:
            _warn_of_zeros(entries, kept)
        return self._spread(kept)

    def _entries(self, scores: Tensors) -> Tensors:
        """Signed scores, summed over what is kept or dropped together."""
        double = any(score.dtype == torch.float64 for score in scores.values())
        dtype = torch.float64 if double else torch.float32
        scores = {name: score.to(dtype) for name, score in scores.items()}
        if self.granularity == "weight":
            return scores
        if self.granularity == "channel":
            return {n: channels.channel_sums(scores, n, of) for n, of in self.layers.items()}
        sums = [
            torch.ops.fastprune.block_scores([score], [], "value", list(self.granularity))[0]
            for score in scores.values()
        ]
        return dict(zip(scores, sums, strict=True))

    def _choose(self, entries: Tensors, sparsity: Sparsities) -> Tensors:
        device = next(iter(entries.values())).device
        values = [entry.to(device) for entry in entries.values()]
        sizes = [value.numel() for value in values]
        least = [min(self.min_kept_per_layer, size) for size in sizes]
        if self.scope == "layer" or isinstance(sparsity, Mapping):
            each = [_of(sparsity, name) for name in entries]
            counts = [num_kept(s, size) for s, size in zip(each, sizes, strict=True)]
            kept = layer_topk_masks(values, list(map(max, counts, least)))
        else:
            count = num_kept(sparsity, sum(sizes))
            if sum(least) > count:
                raise ValueError(
                    f"min_kept_per_layer={self.min_kept_per_layer} asks for {sum(least)} in "
                    f"{len(values)} layers, but sparsity {sparsity} keeps {count}; lower either"
                )
            if any(least):
                first = layer_topk_masks(values, least)
                values = [v.masked_fill(m, torch.inf) for v, m in zip(values, first, strict=True)]
            kept = global_topk_masks(values, count)
        return {
            name: mask.to(entry.device)
            for (name, entry), mask in zip(entries.items(), kept, strict=True)
        }

    def _check_layers(self, kept: Tensors, sparsity: Sparsities) -> None:
        empty = [name for name, mask in kept.items() if mask.numel() and not mask.any()]
        if empty:
            whats = {"weight": "weights", "channel": "channels"}
            what = whats.get(str(self.granularity), "blocks")
            asked = "the sparsities" if isinstance(sparsity, Mapping) else f"sparsity {sparsity}"
            raise LayerCollapse(
                f"{', '.join(empty)} would lose all {what} at {asked}, and the network with "
                f"{'it' if len(empty) == 1 else 'them'}; use min_kept_per_layer=1 or more, "
                "scope='layer', a lower sparsity, or exclude these names"
            )

    def _spread(self, kept: Tensors) -> MaskSet:
        weights = self.weights
        if self.granularity == "weight":
            return MaskSet(kept, self.owners)
        if self.granularity == "channel":
            masks = {
                n: channels.channel_mask(k, weights[n], self.layers[n]) for n, k in kept.items()
            }
            masks |= channels.companion_masks(kept, self.layers)
            return MaskSet(masks, self.owners)
        block = self.granularity
        masks = {n: _expanded([k], [weights[n]], block)[0] for n, k in kept.items()}
        return MaskSet(masks, self.owners)


def selection(
    model: nn.Module,
    run: Callable[[], object] | None,
    sparsity: Sparsities,
    rank: Rank = "magnitude",
    granularity: Granularity = "weight",
    scope: Scope = "global",
    min_kept_per_layer: int = 0,
    exclude: Collection[str] | None = None,
) -> Selection:
    """Checks the options; for channels `run` calls the model once."""
    granularity = _checked_granularity(granularity)
    if scope not in SCOPES:
        raise ValueError(f"scope must be one of {', '.join(map(repr, SCOPES))}, got {scope!r}")
    least = min_kept_per_layer
    if isinstance(least, bool) or not isinstance(least, int) or least < 0:
        raise ValueError(f"min_kept_per_layer must be an integer of at least 0, got {least!r}")
    weights = pruned_weights(model, exclude, granularity)
    for name in weights:
        num_kept(_of(sparsity, name), 0)  # checks it, before any work
    layers = {}
    if granularity == "channel":
        if run is None:
            raise ValueError(
                "granularity='channel' needs the data, to see which norm follows which layer; "
                "use 'weight' or (outputs, inputs)"
            )
        layers = channels.layers(model, list(weights), run)
    owners: Tensors = {name: parameter for name, parameter in model.named_parameters()}
    options = (sparsity, rank, granularity, scope, least)
    return Selection(weights, *options, layers, owners=owners)


def pruned_weights(
    model: nn.Module,
    exclude: Collection[str] | None = None,
    granularity: Granularity = "weight",
) -> Tensors:
    """The prunable weights that are trained, but for the excluded ones."""
    weights = {n: p.detach() for n, p in prunable_parameters(model).items() if p.requires_grad}
    if exclude is None:
        exclude = list(weights)[-1:] if granularity == "channel" else []
    if isinstance(exclude, str) or (unknown := sorted(set(exclude) - weights.keys())):
        got = exclude if isinstance(exclude, str) else ", ".join(unknown)
        raise ValueError(
            f"exclude must hold names of trained prunable weights, such as "
            f"{', '.join(list(weights)[:3])}; got {got}"
        )
    weights = {name: weight for name, weight in weights.items() if name not in exclude}
    if not weights:
        raise ValueError(
            f"{type(model).__name__} has no convolution, linear or attention weight to prune that "
            "is trained (requires_grad) and not excluded"
        )
    return weights


def _checked_granularity(granularity: Granularity) -> Granularity:
    if isinstance(granularity, str):
        if granularity not in ("weight", "channel"):
            raise ValueError(
                f"granularity must be 'weight', 'channel' or (outputs, inputs), got {granularity!r}"
            )
        return granularity
    return checked_block(granularity)


def _of(sparsity: Sparsities, name: str) -> Sparsity:
    if not isinstance(sparsity, Mapping):
        return sparsity
    if name not in sparsity:
        raise ValueError(f"sparsity names {len(sparsity)} weights, but not {name}")
    return sparsity[name]


def _check_finite(entries: Tensors) -> None:
    for name, entry in entries.items():
        if not entry.isfinite().all():
            raise ValueError(
                f"the scores of {name} are not finite: the loss or the inner steps diverged; "
                "lower inner_lr, or look at the data and the weights"
            )


def _warn_of_zeros(entries: Tensors, kept: Tensors) -> None:
    zeros = sum(int(((entries[name] == 0) & mask).sum()) for name, mask in kept.items())
    if zeros:
        total = sum(int(mask.sum()) for mask in kept.values())
        warnings.warn(
            f"{zeros} of the {total} kept have score 0 (weights without gradient, such as those "
            "of dead inputs): among these the first by position were taken",
            stacklevel=4,
        )


def masks_from_scores(
    model: nn.Module,
    scores: Mapping[str, Tensor],
    sparsity: Sparsities,
    *,
    rank: Rank = "magnitude",
    invert: bool = False,
    granularity: tuple[int, int] | Literal["weight"] = "weight",
    scope: Scope = "global",
    min_kept_per_layer: int = 0,
) -> MaskSet:
    """Masks that keep the best of any scores, such as those of `fp.scores`.

    `rank` is "magnitude" (|score|, of ProsPr and SNIP) or "value" (the largest: GraSP).
    `invert=True` keeps the worst instead: a method whose scores mean anything must then do badly.

    `scope="global"` ranks all weights together, "layer" gives each the same sparsity, and a
    mapping of name to sparsity, such as `fp.erk` returns, each its own. Exactly
    `num_kept(sparsity, N)` of N stay, ties by position.

    `granularity` is "weight", (outputs, inputs) for blocks of a weight's first two dimensions or,
    where a method runs the model, "channel": scores are summed with their signs over what is kept
    or dropped together, and sparsity counts blocks or channels. With a channel go its entries of
    the bias and of a norm right behind the layer; the masks cover them too.

    A layer that would lose everything raises `LayerCollapse`; `min_kept_per_layer` gives each
    layer its best few first. `exclude` names weights that are not pruned; with channels these are,
    unless said otherwise, the last weight alone, whose channels are the network's outputs.
    """
    if rank not in ("magnitude", "value"):
        raise ValueError(f"rank must be 'magnitude' or 'value', got {rank!r}")
    known = prunable_parameters(model)
    for name, score in scores.items():
        if name not in known or score.shape != known[name].shape:
            raise ValueError(
                f"scores must have the names and shapes of prunable weights; {name} of shape "
                f"{tuple(score.shape)} is none"
            )
    excluded = [name for name in pruned_weights(model) if name not in scores]
    least = min_kept_per_layer
    chosen = selection(model, None, sparsity, rank, granularity, scope, least, excluded)
    chosen = replace(chosen, invert=invert)
    return chosen.masks({name: scores[name].detach() for name in chosen.weights})
